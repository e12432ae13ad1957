#!/usr/bin/env bash
# Standard benchmarks of a checkpoint or an adapter, by lm-evaluation-harness (.venv/bin/pip install lm_eval).
#   MODEL=output/finetune bash scripts/run_lm_eval.sh --tasks cmmlu,ceval-valid
#   bash scripts/run_lm_eval.sh --compare output/base/lm_eval output/finetune/lm_eval
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh" requirements.txt
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1
exec "${VENV:-$root/.venv}/bin/python" -m predict.lm_eval_run ${MODEL:+--model "$MODEL"} "$@"
