#!/usr/bin/env bash
# All tests, in the environment .venv (made when it is not there). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup_env.sh dev
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest "$@"
