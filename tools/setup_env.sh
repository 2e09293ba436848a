#!/usr/bin/env bash
# Create the virtual environment .venv with the tested versions, once.
#   bash tools/setup_env.sh        packages for training
#   bash tools/setup_env.sh dev    also those for tests, lint and benchmarks
set -euo pipefail
cd "$(dirname "$0")/.."
extra="${1:-}"
stamp=".venv/installed${extra:+-$extra}"
wanted="$(cat pyproject.toml requirements/constraints.txt | sha256sum)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed, '$python' is $("$python" --version 2>&1); set PYTHON=/path/to/python3.11" >&2
    exit 2
fi
echo "Setting up .venv with $("$python" --version) ..."
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint requirements/constraints.txt --editable ".${extra:+[$extra]}"
echo "$wanted" >"$stamp"
