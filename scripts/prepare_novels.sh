#!/usr/bin/env bash
# A folder of novels -> clean chapters, without repeats, split by book, and a report. Without arguments: the samples.
#   bash scripts/prepare_novels.sh my_novels data/novels [--flag value …]
# Run it again after a change or an interrupt: what is done stays done. --help lists all flags.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
bash "$here/setup.sh" requirements.txt
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the work is spread over processes
if [ "$#" -eq 0 ]; then
  echo "no folder given: preparing the samples into output/novels"
  set -- "$root/dataset/samples/novels" "$root/output/novels"
fi
exec "${VENV:-$root/.venv}/bin/python" -m dataset novels "$@"
