#!/usr/bin/env bash
# Start a pipeline: plain python, or novelgpt.launch with a process a device, on this host or on several.
#   bash scripts/launch.sh pretrain|finetune|finetune_lora|predict [--flag value …]
# MODEL=…     --model: a folder, a hub name, or tiny for the small base
# NPROC=…     processes on this host. Default: one a GPU, 1 without
# ZERO=0-3    DeepSpeed ZeRO stage; 0 is plain data parallelism. Default: 0 for one process, 2 for several
# OFFLOAD=1   optimizer states in host memory (ZERO=2), weights too (ZERO=3)
#             Settings of your own, named by --deepspeed or in a file of --config, take the place of both.
# HOSTFILE=…  lines of `host slots=N`, for several hosts; the first is this one
# HOSTS=… HOST=… MASTER_ADDR=… MASTER_PORT=…  for several hosts that are started one by one; Slurm says the same itself
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
die() {
  echo "error: $1" >&2
  echo "  fix: $2" >&2
  exit 2
}

pipeline="${1:-}"
case "$pipeline" in
  pretrain | finetune | finetune_lora | predict) shift ;;
  *) die "no pipeline named ${pipeline:-(nothing)}" "bash scripts/launch.sh pretrain|finetune|finetune_lora|predict [--flag value …]" ;;
esac

bash "$here/setup.sh" requirements.txt
venv="${VENV:-$root/.venv}"
python="$venv/bin/python"
export PATH="$venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-true}"
# glibc would hand the large blocks of each step back to the system and ask for them again.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-8589934592}"
export PYTHONUNBUFFERED=1 # lines appear as they are written, in files and pipes too

gpus=0
if command -v nvidia-smi > /dev/null 2>&1; then
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    gpus="$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c '[0-9A-Za-z]' || true)"
  else
    gpus="$({ nvidia-smi -L 2> /dev/null || true; } | grep -c '^GPU' || true)"
  fi
fi
if [ "$gpus" -eq 0 ]; then export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"; fi

processes="${NPROC:-$((gpus > 1 ? gpus : 1))}"
case "$processes" in
  '' | *[!0-9]* | 0 | ?????*) die "NPROC=$processes is no number of processes" "NPROC=2, for example" ;;
esac
case "${HOSTS:-1}" in
  *[!0-9]* | 0 | ?????*) die "HOSTS=$HOSTS is no number of hosts" "HOSTS=2, for example" ;;
esac
slurm=0
if [ "${SLURM_STEP_NUM_NODES:-1}" -gt 1 ]; then slurm=1; fi
several=0
if [ "$processes" -gt 1 ] || [ -n "${HOSTFILE:-}" ] || [ "${HOSTS:-1}" -gt 1 ] || [ "$slurm" -eq 1 ]; then several=1; fi
zero="${ZERO:-$((several ? 2 : 0))}"
if [ "$pipeline" = predict ]; then zero=0; fi # whole weights on each device
case "$zero" in
  0 | 1 | 2 | 3) ;;
  *) die "ZERO=$zero is no stage" "take 0, 1, 2 or 3" ;;
esac

options=()
help=0
for word in "$@"; do
  case "$word" in --help | -h | --help_all) help=1 ;; esac
done
if [ -n "${MODEL:-}" ]; then options+=(--model "$MODEL"); fi # a --model among the arguments comes later, and counts
if [ "$help" -eq 1 ]; then exec "$python" -m "$pipeline" "$@"; fi

if [ "$pipeline" != predict ] && [ "$zero" -gt 0 ]; then
  variant="zero$zero"
  if [ "${OFFLOAD:-0}" = 1 ]; then
    [ "$zero" -ge 2 ] || die "OFFLOAD=1 has nothing to move at ZERO=$zero" "take ZERO=2 or ZERO=3"
    variant="${variant}_offload"
  fi
  options+=(--deepspeed_by_default "$here/deepspeed/$variant.json")
elif [ "$pipeline" != predict ] && [ "${OFFLOAD:-0}" = 1 ]; then
  die "OFFLOAD=1 needs DeepSpeed" "take ZERO=2 or ZERO=3"
fi

# Ranks on one host share its cores.
if [ -z "${OMP_NUM_THREADS:-}" ] && [ -z "${HOSTFILE:-}" ]; then
  threads=$(($(nproc) / processes))
  export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi

if [ "$several" -eq 0 ] && [ "$zero" -eq 0 ]; then
  # One process means one device: with several in sight, the Trainer would split every batch among them.
  if [ "$gpus" -gt 1 ]; then
    devices="${CUDA_VISIBLE_DEVICES:-0}"
    export CUDA_VISIBLE_DEVICES="${devices%%,*}"
  fi
  exec "$python" -m "$pipeline" "${options[@]}" "$@"
fi
launcher=("$python" -m novelgpt.launch --processes "$processes")
if [ -n "${MASTER_PORT:-}" ]; then launcher+=(--port "$MASTER_PORT"); fi
if [ -n "${HOSTFILE:-}" ]; then
  launcher+=(--hostfile "$HOSTFILE")
elif [ "$slurm" -eq 1 ]; then
  launcher+=(--slurm)
elif [ -n "${HOSTS:-}" ]; then
  launcher+=(--hosts "$HOSTS" --host "${HOST:-0}" --address "${MASTER_ADDR:-}")
fi
exec "${launcher[@]}" "$pipeline" "${options[@]}" "$@"
