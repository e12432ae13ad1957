#!/usr/bin/env bash
# Continued pretraining on raw text. Without arguments: the small base (MODEL=tiny) and the samples.
#   MODEL=Qwen/Qwen3-0.6B bash scripts/run_pretrain.sh --train_files books/*.txt --max_length 4096
# The variables MODEL, NPROC, ZERO, OFFLOAD and HOSTFILE are described in launch.sh; --help lists all flags.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" pretrain "$@"
