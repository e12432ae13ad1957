#!/usr/bin/env bash
# Start a pipeline: plain python, or novelgpt.launch with a process a device, on this host or on several.
#   bash scripts/launch.sh pretrain|finetune|finetune_lora|predict [--flag value …]
# What the variables MODEL, NPROC, ZERO, OFFLOAD, MAX_RESTARTS, HOSTFILE, HOSTS and others mean is said, and decided, in
# novelgpt/launch/start.py.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh" requirements.txt
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${VENV:-$root/.venv}/bin/python" -m novelgpt.launch.start "$@"
