#!/usr/bin/env bash
# The whole workflow on the small base and the samples: pretrain, fine-tune, LoRA-fine-tune, predict, a report, tables.
# Needs git, Python >= 3.10 and a package index; no model hub, no GPU. Replaces output/demo.
#   bash scripts/run_demo.sh [FOLDER]     FOLDER takes the place of output/demo
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh" requirements.txt
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${VENV:-$root/.venv}/bin/python" -m cli.demo "$@"
