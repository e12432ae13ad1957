#!/usr/bin/env bash
# Make .venv and install the requirements once; again only when a requirements file or the Python has changed.
#   bash scripts/setup.sh [requirements.txt | requirements-dev.txt]
# PYTHON=… chooses the interpreter, VENV=… another folder.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
requirements="$root/${1:-requirements.txt}"
venv="${VENV:-$root/.venv}"
python="${PYTHON:-python3}"

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
  echo "error: $python is missing or older than Python 3.10" >&2
  echo "  fix: install Python 3.10 or newer, or name it: PYTHON=python3.11 bash $0" >&2
  exit 2
fi
stamp_of() { echo "$venv/installed-$(cat "$root/requirements.txt" "$1" | cksum | tr ' ' '-')"; }
if [ ! -e "$(stamp_of "$requirements")" ] && command -v flock > /dev/null; then
  # Of runs that start together, one installs; the others wait for it.
  exec 9< "$root"
  flock 9 || true
fi
# pip's list of its own files is the last that is written when an environment is made.
holds_pip() { "$venv/bin/python" -c 'import sys; from importlib.metadata import files; sys.exit(not files("pip"))' 2>/dev/null; }
if [ ! -x "$venv/bin/python" ] || { [ ! -e "$(stamp_of "$requirements")" ] && [ -e "$venv/pyvenv.cfg" ] && ! holds_pip; }; then
  echo "making $venv" # again, where that was interrupted
  "$python" -m venv "$venv" || {
    echo "error: $python cannot make a virtual environment" >&2
    echo "  fix: install the venv module (Debian, Ubuntu: apt-get install python3-venv)" >&2
    exit 2
  }
fi
if [ ! -e "$(stamp_of "$requirements")" ]; then
  echo "installing $(basename "$requirements") (once; some minutes)"
  if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"; then
    echo "error: pip could not install $requirements" >&2
    echo "  fix: check the network and the package index, then run the same command again" >&2
    exit 2
  fi
  # The development requirements contain the others, so they satisfy both.
  touch "$(stamp_of "$requirements")" "$(stamp_of "$root/requirements.txt")"
fi
