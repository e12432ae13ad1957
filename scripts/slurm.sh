#!/usr/bin/env bash
#SBATCH --job-name=novelgpt
#SBATCH --ntasks-per-node=1
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# A pipeline on the hosts of a Slurm job, one task a host, which starts a process a GPU. From the checkout:
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00 scripts/slurm.sh finetune --model MODEL …
# 300 seconds before the time limit the run saves and ends; the same sbatch resumes from there.
# The variables MODEL, NPROC, ZERO, OFFLOAD and MAX_RESTARTS (a rank that is killed starts all again within the job) are
# described in novelgpt/launch/start.py.
set -euo pipefail
# Slurm runs a copy of this file, so that its own place says nothing.
if [ ! -e scripts/launch.sh ]; then
  echo "error: $PWD is not a checkout of this project" >&2
  echo "  fix: go to the checkout first, then sbatch scripts/slurm.sh …; other paths may be absolute" >&2
  exit 2
fi
bash scripts/setup.sh requirements.txt
# By it the hosts know each other. srun hands it to its tasks, whose environment only you can read.
if [ -z "${NOVELGPT_SECRET:-}${SECRET_FILE:-}" ]; then NOVELGPT_SECRET="$(head -c 32 /dev/urandom | base64)"; fi
export NOVELGPT_SECRET
exec srun bash scripts/launch.sh "$@"
