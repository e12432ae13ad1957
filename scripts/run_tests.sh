#!/usr/bin/env bash
# Set up like every script, then check the style, the types and the layering, and run every test.
#   bash scripts/run_tests.sh            every contract, in minutes
#   bash scripts/run_tests.sh --all      also what repeats a contract many times, or needs other versions of libraries
# Further arguments go to pytest: bash scripts/run_tests.sh -k rouge
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
cd "$root"
bash "$here/setup.sh" requirements-dev.txt
export PATH="${VENV:-$root/.venv}/bin:$PATH"
export HF_HUB_OFFLINE=1
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
ruff check .
ruff format --check .
mypy
lint-imports
# Workers with one thread each: torch processes that share cores with several threads each wait for each other. Half as
# many more than there are cores, as some tests wait for processes, disks and clocks.
cores="$(env -u OMP_NUM_THREADS nproc)" # which would count threads otherwise
export OMP_NUM_THREADS=1
pytest --numprocesses "$((cores + cores / 2))" --dist worksteal "$@"
