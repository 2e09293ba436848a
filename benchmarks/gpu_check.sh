#!/usr/bin/env bash
# Run all CUDA tests, then measure speed and memory, on a fresh CUDA machine in under nine minutes.
#
#   bash benchmarks/gpu_check.sh              run everything, write to benchmarks/out
#   bash benchmarks/gpu_check.sh --dry-run    list the commands with their time limits in seconds
#   bash benchmarks/gpu_check.sh --cpu        run the same script with the smallest shapes, without a GPU
#
# OUT=DIR       folder for gpu_check.json and gpu_check.md (default: benchmarks/out)
# PYTHON=python3, WHEELS=DIR (default: wheels)
#
# Needs torch 2.11 or newer for CUDA and Python 3.11 or newer, but no network. Other packages are unpacked from wheels in
# $WHEELS to $OUT/packages (a wheel is a zip file, so pip is not needed):
#   this project    numpy pydantic pydantic-core* annotated-types typing-inspection rich markdown-it-py mdurl pygments xxhash*
#   the tests       pytest iniconfig pluggy packaging
#   the peers       transformers tokenizers* huggingface-hub safetensors* regex* pyyaml* tqdm requests or httpx with their
#                   dependencies (list them with `pip download transformers --only-binary :all:`, which needs a network)
# Packages with * are compiled: use the wheels for the machine's Python and platform; all together are about 25 MB.
# Without transformers only the rows of the peers fail.
#
# A part that fails or exceeds its time limit is reported in the result, and the next part runs.
set -uo pipefail
cd "$(dirname "$0")/.."

mode=gpu
for argument in "$@"; do
    case "$argument" in
    --cpu) mode=cpu ;;
    --dry-run) dry_run=yes ;;
    *) echo "error: unknown option $argument; see the head of $0" >&2 && exit 2 ;;
    esac
done
out="$(realpath -m "${OUT:-benchmarks/out}")"
python="${PYTHON:-python3}"
notes=()
results=()

# part NAME SECONDS COMMAND...: run a command with a time limit.
part() {
    local name="$1" seconds="$2" started=$SECONDS code=0
    shift 2
    if [ -n "${dry_run:-}" ]; then
        printf '%-12s %4d s  %s\n' "$name" "$seconds" "$*"
        return
    fi
    echo "== $name, at most $seconds s" >&2
    timeout --kill-after=10 "$seconds" "$@" >"$out/$name.log" 2>&1 || code=$?
    notes+=(--note "$name: $([ $code = 0 ] && echo passed || echo "failed with code $code"), $((SECONDS - started)) s: $(grep . "$out/$name.log" | tail -n 1 | cut -c 1-160)")
}

# row NAME SECONDS OPTIONS...: one table of throughput.py.
row() {
    local name="$1" seconds="$2"
    shift 2
    results+=("$out/$name.json")
    part "$name" "$seconds" "$python" benchmarks/throughput.py --one-by-one --title "$name" --json "$out/$name.json" "$@"
}

if [ -z "${dry_run:-}" ]; then
    rm -rf "$out" && mkdir -p "$out/packages"
    for wheel in "${WHEELS:-wheels}"/*.whl; do
        # What the machine has stays: a wheel must not hide a package that torch came with.
        name="$(basename "$wheel" | cut -d - -f 1)"
        if [ -e "$wheel" ] && ! "$python" -c "import importlib.metadata as m; m.version('$name')" 2>/dev/null; then
            "$python" -m zipfile -e "$wheel" "$out/packages"
        fi
    done
    export PYTHONPATH="$PWD:$out/packages${PYTHONPATH:+:$PYTHONPATH}"
fi

if [ $mode = cpu ]; then
    quick=(--rounds 1 --steps 1)
    part tests 60 "$python" -m pytest -q tests/cuda
    row tiny 60 --shape tiny "${quick[@]}" --variant short documents=short --variant wrong model.no_such_key=1
    row broken 20 --shape tiny "${quick[@]}" --set model.no_such_key=1
else
    few=(--rounds 3 --steps 4 --compile)
    part tests 100 "$python" -m pytest -q tests/cuda
    # All of the few layers in fp8: the first and the last stay in bf16 otherwise, which is half of them here.
    row 7b-layers 205 --shape 7b-layers "${few[@]}" --against hf \
        --variant fp8 float8.enable_float8_linear=True float8.first_and_last_layer=True \
        --variant short documents=short
    row 1.5b 85 --shape 1.5b "${few[@]}" --variant fp8 float8.enable_float8_linear=True
    row 7b 65 --shape 7b --rounds 1 --steps 2 --no-ceiling --compile --checkpoint 1 \
        --set hybrid_zero_optimizer.grad_accumulation_dtype=torch.bfloat16
    # So small that launching kernels is what takes time.
    row demo 55 --shape demo --rounds 3 --steps 20 --no-ceiling --compile --variant graphs model.cuda_graphs=True
fi

if [ -n "${dry_run:-}" ]; then
    exit 0
fi
"$python" benchmarks/speed/report.py "${results[@]}" "${notes[@]}" \
    --json "$out/gpu_check.json" --markdown "$out/gpu_check.md"
