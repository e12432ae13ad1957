#!/usr/bin/env bash
# A base of 3 M weights that writes Chinese, from a folder of novels and a file of title/abstract rows.
#   bash scripts/recipes/tiny_base.sh CORPUS PAPERS OUT
# Prepares the novels without the works that are held out, trains a tokenizer of 4,096 tokens and a Qwen3 of random
# weights, first on short blocks, then on blocks of 4,096 tokens while the learning rate falls, and leaves OUT/tiny: weights
# in bf16, tokenizer, model card. On 2 CPU cores about two hours. What is done stays done: stopped or killed, the same
# command resumes. If CORPUS has a manifest.json, a list of {file, title, author, author_death_year}, the card names them.
#
# Variables: STABLE_STEPS and DECAY_STEPS, optimizer steps of 2,048 and 8,192 tokens; NPROC, processes; PRECISION (bf16
# where the processor is fast in it); MODERN and PAPER, how often modern works and papers are named for once that
# earlier works are; VOCABULARY; HELD_OUT, the list of works, or options of `dataset novels` in its place;
# EVALUATED, characters of each held-out work that figures are measured on, 0 for all; LICENSE, of the weights, for the card.
# QWEN2_TOKENIZER=FOLDER also trains two models of 3 M weights on the first COMPARED characters of the same text, one
# with the tokenizer made here and one with that of the folder (20 minutes), and has the card compare them.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
if [ "$#" -ne 3 ]; then
  echo "error: $# words in place of three" >&2
  echo "  fix: bash scripts/recipes/tiny_base.sh CORPUS PAPERS OUT" >&2
  exit 2
fi
corpus="$1" papers="$2" out="$3" recipe="$here/tiny_base"
ranks="${NPROC:-1}"
if [ -z "${PRECISION:-}" ]; then
  PRECISION=auto # bf16 on GPUs
  if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then PRECISION=bf16; fi
fi
bash "$root/scripts/setup.sh" requirements.txt
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
python="${VENV:-$root/.venv}/bin/python"
step() { printf '\n== %s\n' "$*"; }
finished() { grep -qs '"status": "finished"' "$1/run.json"; }

step "1/7 The novels, without the works that are held out"
read -ra held_out <<< "${HELD_OUT:---held_out_works public_domain}"
"$python" -m dataset novels "$corpus" "$out/novels" "${held_out[@]}"
if [ ! -e "$out/parts/books.json" ]; then
  books=()
  if [ -e "$corpus/manifest.json" ]; then books=(--books "$corpus/manifest.json"); fi
  "$python" "$recipe/parts.py" "$out/novels" "$papers" "$out/parts" "${books[@]}"
fi

step "2/7 The tokenizer"
texts=("$out/parts/papers.jsonl")
train=()
for ((n = 0; n < ${PAPER:-10}; n++)); do train+=("$out/tokens/papers"); done
for part in modern earlier; do
  if [ ! -s "$out/parts/$part.jsonl" ]; then continue; fi
  texts+=("$out/parts/$part.jsonl")
  if [ "$part" = modern ]; then times="${MODERN:-6}"; else times=1; fi
  for ((n = 0; n < times; n++)); do train+=("$out/tokens/$part"); done
done
if [ ! -e "$out/tokenizer/tokenizer.json" ]; then
  "$python" -m dataset tokenizer "${texts[@]}" "$out/tokenizer" --kind byte_bpe --vocab_size "${VOCABULARY:-4096}"
fi

step "3/7 Text to tokens"
make_tokens() { # FOLDER TOKENIZER
  mkdir -p "$1"
  for part in "${texts[@]}" "$out/parts/held_out.jsonl"; do
    "$python" -m dataset tokens "$part" "$1/$(basename "$part" .jsonl)" --model "$2"
  done
}
make_tokens "$out/tokens" "$out/tokenizer"

# RUN STEPS ROWS_A_STEP WORD…: `pretrain` into the folder RUN, unless that is done.
pretrain() {
  local run="$1" steps="$2" rows="$3"
  shift 3
  if finished "$run"; then return; fi
  bash "$root/scripts/run_pretrain.sh" --output_dir "$run" --max_steps "$steps" --precision "$PRECISION" \
    --per_device_train_batch_size "$((rows / ranks))" "$@"
}

step "4/7 Training on short blocks, at a constant learning rate"
data=(--train_files "${train[@]}" --valid_files "$out/tokens/held_out")
pretrain "$out/stable" "${STABLE_STEPS:-14000}" 4 --config "$recipe/stable.yaml" \
  --config_name "$recipe/model.json" --tokenizer_name "$out/tokenizer" "${data[@]}"

step "5/7 Training on long blocks, while the learning rate falls"
pretrain "$out/decay" "${DECAY_STEPS:-700}" 2 --config "$recipe/decay.yaml" --model "$out/stable" "${data[@]}"

step "6/7 Weights in bf16, and how it does on works that no training has seen"
if [ ! -e "$out/tiny/config.json" ]; then "$python" "$recipe/export.py" "$out/decay" "$out/tiny"; fi
"$python" -m novelgpt.model.tiny_random "$out/tiny-random"
compare=("tiny-random=$out/tiny-random")
if [ -n "${QWEN2_TOKENIZER:-}" ]; then
  make_tokens "$out/tokens-qwen2" "$QWEN2_TOKENIZER"
  for kind in own qwen2; do
    if [ "$kind" = own ]; then tokens="$out/tokens" model=model tokenizer="$out/tokenizer"
    else tokens="$out/tokens-qwen2" model=narrow tokenizer="$QWEN2_TOKENIZER"; fi
    if [ ! -e "$out/compared/$kind-steps" ]; then
      mkdir -p "$out/compared"
      "$python" "$recipe/steps.py" "$out/parts" "$tokens" "${COMPARED:-1000000}" 4096 > "$out/compared/$kind-steps.unfinished"
      mv "$out/compared/$kind-steps.unfinished" "$out/compared/$kind-steps"
    fi
    pretrain "$out/compared/$kind" "$(cat "$out/compared/$kind-steps")" 8 --config "$recipe/compared.yaml" \
      --config_name "$recipe/$model.json" --tokenizer_name "$tokenizer" \
      --train_files "${train[@]/#$out\/tokens/$tokens}" --valid_files "$tokens/held_out"
    compare+=("compared-$kind=$out/compared/$kind")
  done
fi
if [ ! -e "$out/evaluation.json" ]; then
  "$python" "$root/benchmarks/tiny_base.py" --model "$out/tiny" --held_out "$out/novels" \
    --characters "${EVALUATED:-100000}" --compare "${compare[@]}" --json "$out/evaluation.json"
fi

step "7/7 The model card"
"$python" "$recipe/card.py" "$out" "${LICENSE:-}"
echo "done: $out/tiny"
