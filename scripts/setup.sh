#!/usr/bin/env bash
# Make .venv ready: torch first, then the hash-pinned lock, then this project. A second run takes a second.
#   PYTHON           interpreter to build .venv with (default python3.11, else python3.12, else python3)
#   VENV             where (default .venv)
#   RAGBLEND_DEVICE  cpu or cuda (default: cuda where nvidia-smi lists one)
#   TORCH_INDEX      an extra package index with the wanted build of torch, for example PyTorch's own CPU wheels
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "setup: $*" >&2; exit 1; }

venv=${VENV:-.venv}
device=${RAGBLEND_DEVICE:-}
if [ -z "$device" ]; then
  if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then device=cuda; else device=cpu; fi
fi
case $device in
  cpu) lock=requirements/cpu.txt ;;
  cuda | cuda:*) lock=requirements/gpu.txt ;;
  *) fail "RAGBLEND_DEVICE=$device is unknown; choose cpu or cuda" ;;
esac
torch=$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

stamp=$venv/.ragblend-setup
want=$(cat "$lock" pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)-$device-$PWD
if [ -x "$venv/bin/ragblend" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
  exit 0
fi

[ "$(uname -sm)" = "Linux x86_64" ] || fail "the locks are for Linux on x86-64, this is $(uname -sm)"

suitable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; }

if ! [ -x "$venv/bin/python" ] || ! suitable "$venv/bin/python"; then
  python=
  for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
    if suitable "$candidate"; then python=$candidate; break; fi
  done
  [ -n "$python" ] || fail "needs Python 3.11 or 3.12 with the venv module (tried: ${PYTHON:-python3.11 python3.12 python3});" \
    "install one, on Debian or Ubuntu with 'apt install python3.11-venv', or name it: make setup PYTHON=/path/to/python3.11"
  echo "setup: $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv"
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
rm -f "$stamp"

echo "setup: $torch"
pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$torch"
if [ "$device" = cpu ] && ! "$venv/bin/python" -c 'import importlib.metadata as m, sys; sys.exit("+cpu" not in m.version("torch"))'; then
  echo "setup: note: this torch carries CUDA; TORCH_INDEX=<PyTorch's CPU wheels> would be a far smaller download" >&2
fi

echo "setup: $lock"
pip install --no-deps --require-hashes -r "$lock"

echo "setup: ragblend"
pip install --no-deps --no-build-isolation --editable .

echo "$want" >"$stamp"
echo "setup: done; try $venv/bin/ragblend --help"
