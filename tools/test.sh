#!/usr/bin/env bash
# Run the tests in the environment .venv, which is created if it does not exist.
#   bash tools/test.sh [ARGUMENTS OF PYTEST]    all tests, on two workers; `-n 0` runs them in one process
#   bash tools/test.sh --full [SECONDS]         also the campaigns, which take hours: every layout of the matrix,
#                                               SECONDS (default 1800) of random layouts, 200 kills at random instants,
#                                               5 minutes of load on a server
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup_env.sh dev
export OMP_NUM_THREADS=1
# Otherwise each of the hundreds of processes that the tests start compiles the package again.
unset PYTHONDONTWRITEBYTECODE
test=(.venv/bin/python -m pytest -n 2 --dist worksteal)
if [ "${1:-}" != "--full" ]; then
    exec "${test[@]}" "$@"
fi
"${test[@]}"
seed="$(date +%s)"
echo "Campaigns with --seed $seed"
.venv/bin/python tests/fuzz_layouts.py --seconds "${2:-1800}" --seed "$seed"
.venv/bin/python tests/kill_and_resume.py --kills 100 --seed "$seed"
.venv/bin/python tests/kill_and_resume.py --kills 100 --ranks 2 --async --seed "$seed"
.venv/bin/python tests/soak_server.py --seconds 300 --seed "$seed"
INTERNLM_FULL_MATRIX=1 "${test[@]}" tests/layouts/test_layout_matrix.py tests/layouts/test_expert_matrix.py \
    tests/layouts/test_context_matrix.py
