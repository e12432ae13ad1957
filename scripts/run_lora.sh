#!/usr/bin/env bash
# LoRA fine-tuning on conversations. Without arguments: the small base (MODEL=tiny) and the samples.
#   MODEL=Qwen/Qwen3-0.6B bash scripts/run_lora.sh --train_files my.jsonl --learning_rate 1e-4
# The variables MODEL, NPROC, ZERO, OFFLOAD and HOSTFILE are described in launch.sh; --help lists all flags.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" finetune_lora "$@"
