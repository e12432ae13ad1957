#!/usr/bin/env bash
# Answers and scores of a full checkpoint or an adapter. Without arguments: the newest fine-tuning and the samples.
#   MODEL=output/finetune_lora bash scripts/run_predict.sh --data_files test.jsonl
# The variables MODEL, NPROC, ZERO, OFFLOAD and HOSTFILE are described in launch.sh; --help lists all flags.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" predict "$@"
