#!/usr/bin/env bash
# A base of 3 M weights that writes Chinese, from a folder of novels and a file of title/abstract rows.
#   bash scripts/recipes/tiny_base.sh CORPUS PAPERS OUT
# Prepares the novels without the works that are held out, trains a tokenizer and a Qwen3 of random weights, first on
# short blocks, then on blocks of 4,096 tokens while the learning rate falls, and leaves OUT/tiny: weights in bf16,
# tokenizer, model card. On 2 CPU cores it takes about two hours. If it is stopped or killed, the same command resumes.
# If CORPUS has a manifest.json, a list of {file, title, author, author_death_year}, the card names the works by it.
#
# Variables, with their defaults:
#   STABLE_STEPS=14000 DECAY_STEPS=400  optimizer steps of 2,048 and of 8,192 tokens
#   VOCABULARY=4096        tokens of the tokenizer, at most 7000: the weights may take 8 MB
#   MODERN=6 PAPER=10      copies of modern works and of papers in the text, which holds earlier works once; the steps
#                          decide how much of it is read; PAPER=0 trains on no paper
#   HELD_OUT=public_domain list of works to hold out: a name, or a file of `dataset held_out`
#   HELD_OUT_SHARE=0       share of the other books to hold out as well
#   NPROC=1                processes, 1 or 2
#   PRECISION=…            default: bf16 on GPUs and on processors that are fast in it, else fp32
#   EVALUATED=100000       characters of each held-out text that bits per character are measured on, 0 for all
#   LICENSE=…              of the weights, for the card
#   QWEN2_TOKENIZER=FOLDER also train two models of 3 M weights on about COMPARED=1000000 characters, one with the
#                          tokenizer made here and one with that of the folder (20 minutes); the card compares them
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
refuse() { # CAUSE REMEDY
  printf 'error: %s\n  fix: %s\n' "$1" "$2" >&2
  exit 2
}
if [ "$#" -ne 3 ]; then
  refuse "expected 3 arguments, got $#" "bash scripts/recipes/tiny_base.sh CORPUS PAPERS OUT"
fi
corpus="$1" papers="$2" out="$3" recipe="$here/tiny_base"
export NPROC="${NPROC:-${NPROC_PER_NODE:-1}}" # without it, the launcher would start one per GPU
case "$NPROC" in
  1 | 2) ;; # a step has 4, 2 or 8 rows
  *) refuse "$NPROC processes cannot share the 2 rows of a step" "NPROC=1 or NPROC=2" ;;
esac
if [ -z "${PRECISION:-}" ]; then
  PRECISION=auto # bf16 on GPUs
  if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then PRECISION=bf16; fi
fi
if [ -n "${QWEN2_TOKENIZER:-}" ] && [ ! -e "$QWEN2_TOKENIZER/tokenizer_config.json" ]; then
  refuse "QWEN2_TOKENIZER=$QWEN2_TOKENIZER has no tokenizer_config.json" "name the folder of a tokenizer"
fi
stable_steps="${STABLE_STEPS:-14000}" decay_steps="${DECAY_STEPS:-400}" vocabulary="${VOCABULARY:-4096}"
modern="${MODERN:-6}" paper="${PAPER:-10}" held_out="${HELD_OUT:-public_domain}" share="${HELD_OUT_SHARE:-0}"
whole() { # NAME VALUE LEAST
  if ! [[ "$2" =~ ^(0|[1-9][0-9]*)$ ]] || [ "$2" -lt "$3" ]; then
    refuse "$1=$2 is not a whole number of at least $3" "$1=NUMBER, or leave it out"
  fi
}
whole STABLE_STEPS "$stable_steps" 1
whole DECAY_STEPS "$decay_steps" 1
whole VOCABULARY "$vocabulary" 1
whole MODERN "$modern" 1
whole PAPER "$paper" 0
whole EVALUATED "${EVALUATED:-100000}" 0
whole COMPARED "${COMPARED:-1000000}" 1
if [ "$vocabulary" -gt 7000 ]; then
  refuse "VOCABULARY=$vocabulary makes weights of more than 8 MB" "VOCABULARY=7000 or fewer"
fi
bash "$root/scripts/setup.sh" requirements.txt
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
python="${VENV:-$root/.venv}/bin/python"
step() { printf '\n== %s\n' "$*"; }
finished() { grep -qs '"status": "finished"' "$1/run.json"; }

step "1/7 The novels, without the works that are held out"
"$python" "$recipe/origin.py" "$out" "$corpus" "$papers" "$held_out" "HELD_OUT_SHARE=$share" \
  "VOCABULARY=$vocabulary" "MODERN=$modern" "PAPER=$paper" "STABLE_STEPS=$stable_steps" "DECAY_STEPS=$decay_steps"
if [ ! -e "$out/parts/books.json" ]; then
  "$python" -m dataset novels "$corpus" "$out/novels" --held_out_works "$held_out" --held_out_share "$share"
  books=()
  if [ -e "$corpus/manifest.json" ]; then books=(--books "$corpus/manifest.json"); fi
  "$python" "$recipe/parts.py" "$out/novels" "$papers" "$out/parts" ${books[@]+"${books[@]}"}
fi

step "2/7 The tokenizer"
parts=()    # that are trained on
repeated=() # each as often as it is in the text
for part in papers modern earlier; do
  case "$part" in papers) times="$paper" ;; modern) times="$modern" ;; *) times=1 ;; esac
  if [ "$times" -eq 0 ] || [ ! -s "$out/parts/$part.jsonl" ]; then continue; fi
  parts+=("$part")
  for ((n = 0; n < times; n++)); do repeated+=("$part"); done
done
if [ "${#parts[@]}" -eq 0 ]; then
  refuse "with PAPER=0, and without a novel, there is nothing to train on" "add novels to $corpus, or leave PAPER out"
fi
if [ ! -e "$out/tokenizer/tokenizer.json" ]; then
  texts=()
  for part in "${parts[@]}"; do texts+=("$out/parts/$part.jsonl"); done
  "$python" -m dataset tokenizer "${texts[@]}" "$out/tokenizer" --kind byte_bpe --vocab_size "$vocabulary"
fi

step "3/7 Text to tokens"
make_tokens() { # FOLDER TOKENIZER
  mkdir -p "$1"
  for part in "${parts[@]}" held_out; do
    "$python" -m dataset tokens "$out/parts/$part.jsonl" "$1/$part" --model "$2"
  done
}
make_tokens "$out/tokens" "$out/tokenizer"

# FOLDER: `train` is what training reads of the tokens in it.
read_from() {
  train=()
  for part in "${repeated[@]}"; do train+=("$1/$part"); done
}

# RUN STEPS ROWS_PER_STEP TOKENS WORD…: `pretrain` on the folder TOKENS into the folder RUN, unless that is done.
pretrain() {
  local run="$1" steps="$2" rows="$3" tokens="$4"
  shift 4
  if finished "$run"; then return; fi
  read_from "$tokens"
  bash "$root/scripts/run_pretrain.sh" --output_dir "$run" --max_steps "$steps" --precision "$PRECISION" \
    --per_device_train_batch_size "$((rows / NPROC))" "$@" --train_files "${train[@]}" --valid_files "$tokens/held_out"
}

step "4/7 Training on short blocks, at a constant learning rate"
pretrain "$out/stable" "$stable_steps" 4 "$out/tokens" --config "$recipe/stable.yaml" \
  --config_name "$recipe/model.json" --tokenizer_name "$out/tokenizer"

step "5/7 Training on long blocks, while the learning rate falls"
pretrain "$out/decay" "$decay_steps" 2 "$out/tokens" --config "$recipe/decay.yaml" --model "$out/stable"

step "6/7 Weights in bf16, and how it does on texts that no training has seen"
if [ ! -e "$out/tiny/config.json" ]; then "$python" "$recipe/export.py" "$out/decay" "$out/tiny"; fi
"$python" -m novelgpt.model.tiny_random "$out/tiny-random"
compare=("tiny-random=$out/tiny-random")
if [ -n "${QWEN2_TOKENIZER:-}" ]; then
  make_tokens "$out/tokens-qwen2" "$QWEN2_TOKENIZER"
  characters="${COMPARED:-1000000}"
  for kind in own qwen2; do
    if [ "$kind" = own ]; then tokens="$out/tokens" model=model tokenizer="$out/tokenizer"
    else tokens="$out/tokens-qwen2" model=narrow tokenizer="$QWEN2_TOKENIZER"; fi
    read_from "$tokens"
    steps="$("$python" "$recipe/steps.py" "$out/parts" "$characters" 4096 "${train[@]}")"
    pretrain "$out/compared/$kind-$characters" "$steps" 8 "$tokens" --config "$recipe/compared.yaml" \
      --config_name "$recipe/$model.json" --tokenizer_name "$tokenizer"
    compare+=("compared-$kind=$out/compared/$kind-$characters")
  done
fi
evaluate=(--characters "${EVALUATED:-100000}" --compare "${compare[@]}"
  --documents "titles and abstracts 标题与摘要=$out/parts/papers_held_out.jsonl")
asked="${evaluate[*]//"$out/"/}" # of another evaluation, the figures are not those that are asked for now
if [ ! -e "$out/evaluation.json" ] || [ "$(cat "$out/evaluation.txt" 2> /dev/null)" != "$asked" ]; then
  rm -f "$out/evaluation.txt"
  "$python" "$root/benchmarks/tiny_base.py" --model "$out/tiny" --held_out "$out/novels" "${evaluate[@]}" \
    --json "$out/evaluation.json"
  printf '%s\n' "$asked" > "$out/evaluation.txt"
fi

step "7/7 The model card"
"$python" "$recipe/card.py" "$out" "${LICENSE:-}"
echo "done: $out/tiny"
