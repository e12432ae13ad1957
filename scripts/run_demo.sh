#!/usr/bin/env bash
# The whole job on the embedded base and samples: pretrain, fine-tune, LoRA-fine-tune, predict, a report and a table.
# Needs git, Python >= 3.10 and a package index; no model hub, no GPU. Replaces output/demo.
#   bash scripts/run_demo.sh [FOLDER]     FOLDER takes the place of output/demo
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
bash "$here/setup.sh" requirements.txt
unset MODEL NPROC ZERO OFFLOAD HOSTFILE
export HF_HUB_OFFLINE=1
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python="${VENV:-$root/.venv}/bin/python"

demo="$(realpath -m "${1:-$root/output/demo}")"
samples="$root/dataset/samples"
model="$demo/tiny-qwen3"
# Only what an earlier demo left there.
rm -rf "$demo"/{tiny-qwen3,base,pretrain,finetune,finetune_lora,report} "$demo/summary.json"
if ! command -v nvidia-smi > /dev/null 2>&1; then export DS_ACCELERATOR=cpu; fi
"$python" -m novelgpt.model.embedded_base "$model"

step() { printf '\n== %s\n' "$1"; }

step "1/5 The untouched base answers the held-out pairs"
bash "$here/run_predict.sh" --model "$model" --output_dir "$demo/base" --max_new_tokens 320

step "2/5 Continued pretraining on one novel and on abstracts, evaluated on another novel"
bash "$here/run_pretrain.sh" --model "$model" --config "$root/pretrain/configs/tiny.yaml" \
  --train_files "$samples/novels/deng_ta_xia_de_xin.txt" "$samples/papers/train.jsonl" --text_column abstract \
  --valid_files "$samples/novels/shan_zhong_yao_pu.txt" --output_dir "$demo/pretrain"
bash "$here/run_predict.sh" --model "$demo/pretrain" --max_new_tokens 320

step "3/5 Full fine-tuning on title -> abstract pairs"
bash "$here/run_finetune.sh" --model "$demo/pretrain" --config "$root/finetune/configs/tiny.yaml" \
  --valid_files "$samples/papers/valid.jsonl" --output_dir "$demo/finetune"
bash "$here/run_predict.sh" --model "$demo/finetune" --max_new_tokens 320

step "4/5 LoRA fine-tuning on the same pairs"
bash "$here/run_lora.sh" --model "$demo/pretrain" --config "$root/finetune_lora/configs/tiny.yaml" \
  --valid_files "$samples/papers/valid.jsonl" --output_dir "$demo/finetune_lora"
bash "$here/run_predict.sh" --model "$demo/finetune_lora" --max_new_tokens 320

step "5/5 Results"
"$python" -m predict.report "$demo"/{base,pretrain,finetune,finetune_lora} --output "$demo/report"
"$python" "$here/demo_table.py" "$demo"
