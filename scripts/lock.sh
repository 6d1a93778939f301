#!/usr/bin/env bash
# Rewrite requirements/{cpu,gpu}.txt: every package pinned with hashes, torch left out because setup.sh installs it first.
# Needs uv. UV_FIND_LINKS, UV_DEFAULT_INDEX and friends (or pip's PIP_FIND_LINKS) choose where packages are looked up.
# Usage: scripts/lock.sh [cpu] [gpu]   (default both; existing pins are kept unless UPGRADE=1)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

command -v uv >/dev/null || { echo "lock.sh: needs uv: pip install uv" >&2; exit 1; }
wheels=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}} # where this machine keeps torch's CPU wheel, if it does
[ $# -gt 0 ] || set -- cpu gpu

for device in "$@"; do
  echo "lock: requirements/$device.txt"
  # No CPU build of torch in the GPU resolution: it would leave out the CUDA libraries.
  if [ "$device" = cpu ] && [ -n "$wheels" ]; then export UV_FIND_LINKS=$wheels; else unset UV_FIND_LINKS; fi
  uv pip compile pyproject.toml --extra "$device" --extra dev --override requirements/overrides.txt \
    --output-file "requirements/$device.txt" --quiet ${UPGRADE:+--upgrade} \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes \
    --no-emit-package torch --custom-compile-command "make lock"
  sed -i -E '/^--(find-links|index-url|extra-index-url)/d' "requirements/$device.txt"
  if grep -nE '^kernels==' "requirements/$device.txt"; then
    echo "lock.sh: requirements/$device.txt pins the Hugging Face package 'kernels', which shadows our room of that name" >&2
    exit 1
  fi
done
