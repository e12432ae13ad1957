#!/usr/bin/env bash
# Start a pipeline: as plain python, or by novelgpt.launch with one process per device, on one or several hosts.
#   bash scripts/launch.sh pretrain|finetune|finetune_lora|predict [--flag value …]
# The variables MODEL, NPROC, ZERO, OFFLOAD, MAX_RESTARTS, HOSTFILE, HOSTS and others are described, and read, in
# novelgpt/launch/start.py.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh" requirements.txt
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${VENV:-$root/.venv}/bin/python" -m novelgpt.launch.start "$@"
