#!/usr/bin/env bash
# An end-to-end demo: environment, real text, training on the CPU (or a GPU), evaluation, generation.
# A second call resumes, or reports that the run is complete; `--fresh` starts over. Further arguments go to
# `internlm train`, for example: bash tools/demo.sh --set data.total_steps=1000
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/demo
if [ "${1:-}" = "--fresh" ]; then
    shift
    rm -rf "$run"
fi
bash tools/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=true
started=$SECONDS
python tools/prepare_demo_data.py --out data/demo
# On a CPU use one rank per core, up to the four that share a step's micro-batches. Ranks synchronize once per step,
# threads thousands of times, and other load on the same cores makes each synchronization slow.
read -r ranks threads < <(python - <<'EOF'
import os
import torch

cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
ranks = 1 if torch.cuda.is_available() else max(count for count in (1, 2, 4) if count <= cores)
print(ranks, max(1, cores // ranks))
EOF
)
if [ "$ranks" -gt 1 ]; then
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}" torchrun --standalone --nproc_per_node="$ranks" \
        train.py --config configs/demo.py --run-dir "$run" --set "data.micro_num=$((4 / ranks))" "$@"
else
    internlm train --config configs/demo.py --run-dir "$run" "$@"
fi
python tools/demo_report.py --run-dir "$run" --corpus data/demo/corpus.json
internlm generate --ckpt "$run/checkpoints" --max-new-tokens 60 --temperature 0.7 --top-k 40 --seed 1 \
    --prompt "def read_file(path):" --prompt "The following example" --prompt "import os"
echo "The whole job took $((SECONDS - started)) s after installation. Numbers: $run/metrics.jsonl"
