#!/usr/bin/env bash
# Tell whether this project works on a CUDA GPU, then how fast and with how much memory, the most telling parts first.
#
#   bash benchmarks/gpu_check.sh                  run all parts, in fourteen minutes at most
#   bash benchmarks/gpu_check.sh --stage checks   run the parts of a stage: facts, checks or speed; repeatable
#   bash benchmarks/gpu_check.sh --dry-run        list the parts with their stages and their time limits in seconds
#   bash benchmarks/gpu_check.sh --cpu            run the same script with the smallest shapes, without a GPU
#
# OUT=DIR       folder for the results (default: benchmarks/out), whose other files are left alone:
#               gpu_check.md and gpu_check.json (tables), gpu_check.tar.gz (logs of all parts), written after each part.
#               Parts that passed according to an archive that is there already are not run again; remove it to run all.
# PYTHON=python3, WHEELS=DIR (default: wheels)
#
# Needs torch 2.11 or newer for CUDA and Python 3.11 or newer, but no network. Other packages are unpacked from wheels in
# $WHEELS (a wheel is a zip file, so pip is not needed):
#   this project    numpy pydantic pydantic-core* annotated-types typing-inspection rich markdown-it-py mdurl pygments xxhash*
#                   fsspec pyarrow*
#   the tests       pytest iniconfig pluggy packaging, and if possible pytest-xdist execnet pytest-timeout
#   kernels         liger-kernel and torchao*, without which their tests are skipped
#   the peers       transformers tokenizers* huggingface-hub safetensors* regex* pyyaml* tqdm requests or httpx with their
#                   dependencies (list them with `pip download transformers --only-binary :all:`, which needs a network)
# Packages with * are compiled: use the wheels for the machine's Python and platform; all together are about 80 MB, most of
# it pyarrow. Without transformers only the rows of the peers fail.
#
# A part that fails or exceeds its time limit is reported in the results, and the next part runs.
set -uo pipefail
cd "$(dirname "$0")/.."

mode=gpu
stages=" "
while [ $# -gt 0 ]; do
    case "$1" in
    --cpu) mode=cpu ;;
    --dry-run) dry_run=yes ;;
    --stage) stages+="${2:-} " && shift ;;
    *) echo "error: unknown option $1; see the head of $0" >&2 && exit 2 ;;
    esac
    shift
done
for stage in $stages; do
    case "$stage" in
    facts | checks | speed) ;;
    *) echo "error: --stage is facts, checks or speed, but is '$stage'" >&2 && exit 2 ;;
    esac
done
out="$(realpath -m "${OUT:-benchmarks/out}")"
python="${PYTHON:-python3}"
cores="$(env -u OMP_NUM_THREADS nproc)"

# stage NAME: parts that follow belong to it.
stage() {
    stage="$1"
}

# part NAME SECONDS COMMAND...: run a command with a time limit, unless it passed before.
part() {
    local name="$1" seconds="$2" started=$SECONDS code=0 outcome=passed
    shift 2
    if [ "$stages" != " " ] && [[ "$stages" != *" $stage "* ]]; then
        return
    elif [ -n "${dry_run:-}" ]; then
        printf '%-7s %-11s %4d s ' "$stage" "$name" "$seconds" && printf ' %q' "$@" && echo
        return
    elif grep -qs ": passed" "$work/$name.note"; then
        echo "== $name passed before" >&2
        return
    fi
    echo "== $name, at most $seconds s" >&2
    timeout --kill-after=10 "$seconds" "$@" >"$work/$name.log" 2>&1 || code=$?
    [ $code = 0 ] || outcome="failed with code $code"
    echo "$name: $outcome, $((SECONDS - started)) s: $(grep -v '^ *$' "$work/$name.log" | tail -n 1 | cut -c 1-160)" >"$work/$name.note"
    cat "$work/$name.note" >&2
    report >/dev/null
}

# tests NAME SECONDS FILE...: tests of tests/cuda, on several cores where pytest-xdist is installed.
tests() {
    local name="$1" seconds="$2" options=(-rfE --tb=short --durations=5 -o faulthandler_timeout=60)
    shift 2
    if [ -n "${workers:-}" ]; then options+=(-p xdist -n "$workers"); fi
    part "$name" "$seconds" "$python" -m pytest "${options[@]}" "${@/#/tests/cuda/test_cuda_}"
}

# row NAME SECONDS OPTIONS...: one table of throughput.py.
row() {
    local name="$1" seconds="$2"
    shift 2
    part "$name" "$seconds" "$python" benchmarks/throughput.py --one-by-one --title "$name" --json "$work/$name.json" "$@"
}

# report: write the results of the parts so far, in the order in which they ran.
report() {
    local notes=() results=() note
    while IFS= read -r note; do
        notes+=(--note "$(cat "$note")")
        results+=("${note%.note}.json")
    done < <(ls -tr "$work"/*.note)
    exec 9>"$work/lock"
    flock 9
    "$python" benchmarks/speed/report.py "${results[@]}" "${notes[@]}" \
        --json "$out/gpu_check.json" --markdown "$out/gpu_check.md"
    tar -C "$work" --exclude ./job --exclude ./lock -czf "$out/gpu_check.tar.gz" .
    exec 9>&-
}

work=DIR
if [ -z "${dry_run:-}" ]; then
    work="$(mktemp -d)"
    packages="$(mktemp -d)"
    trap 'rm -rf "$work" "$packages"' EXIT
    mkdir -p "$out"
    if [ -e "$out/gpu_check.tar.gz" ]; then tar -C "$work" -xzf "$out/gpu_check.tar.gz"; fi
    for wheel in "${WHEELS:-wheels}"/*.whl; do
        # What the machine has stays: a wheel must not hide a package that torch came with.
        name="$(basename "$wheel" | cut -d - -f 1)"
        if [ -e "$wheel" ] && ! "$python" -c "import importlib.metadata as m; m.version('$name')" 2>/dev/null; then
            "$python" -m zipfile -e "$wheel" "$packages"
        fi
    done
    export PYTHONPATH="$PWD:$packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    # Other plugins of the machine's packages are of no use to the tests, and slow.
    export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
    if "$python" -c "import xdist" 2>/dev/null; then workers=$(((cores + 3) / 4)); fi
fi
job=("$python" -m internlm.cli train --config configs/demo.py --set data.train_folder=None --set data.valid_folder=None
    --set data.tokenizer_path=None --set "ckpt.save_ckpt_folder=$work/job" --set ckpt.checkpoint_every=10
    --set monitor.log_every=5 --set lr_scheduler.total_steps=30)

if [ $mode = cpu ]; then
    quick=(--rounds 1 --steps 1)
    stage facts
    part doctor 60 "$python" -m internlm.cli doctor
    stage checks
    tests step 60 training_step.py
    stage speed
    row tiny 60 --shape tiny "${quick[@]}" --variant short documents=short --variant wrong model.no_such_key=1
    row hf 60 --shape tiny-hf "${quick[@]}" --no-ceiling
    row llava 60 --shape tiny-llava "${quick[@]}" --no-ceiling
    row broken 20 --shape tiny "${quick[@]}" --set model.no_such_key=1
else
    few=(--rounds 3 --steps 4 --compile)
    stage facts
    part doctor 80 "$python" -m internlm.cli doctor
    stage checks
    tests step 60 training_step.py upload.py loader.py
    part train 60 bash -c '"$@" --set data.total_steps=20 && "$@" --set data.total_steps=30' train "${job[@]}"
    # At the same time: what they take is compilation on the CPU.
    tests ops 150 ops.py experts.py routing.py partial_attention.py &
    tests layers 150 float8.py graphs.py generation.py &
    tests memory 150 step_kernels.py host_waits.py offload.py optimizer_memory.py &
    wait
    stage speed
    # All of the few layers in fp8: the first and the last stay in bf16 otherwise, which is half of them here.
    row 7b-layers 110 --shape 7b-layers "${few[@]}" --against hf
    # The peer is the one above, so that its compiler cache is warm.
    row hf 60 --shape hf-7b-layers "${few[@]}" --no-ceiling --against hf
    row 7b-fp8 50 --shape 7b-layers "${few[@]}" --no-ceiling \
        --set float8.enable_float8_linear=True float8.first_and_last_layer=True
    row 7b 50 --shape 7b --rounds 1 --steps 2 --no-ceiling --compile --checkpoint 1 \
        --set hybrid_zero_optimizer.grad_accumulation_dtype=torch.bfloat16
    row moe 75 --shape 30b-a3b-layers "${few[@]}" --no-ceiling --against hf
    row llava 40 --shape llava-7b-layers --rounds 2 --steps 4 --compile --no-ceiling \
        --variant trained 'optimizer.groups=[{"match": "vision_tower.*"}]'
    row 1.5b 30 --shape 1.5b --rounds 1 --steps 4 --compile --no-ceiling
    part generation 35 "$python" benchmarks/generation.py --device cuda --dtype bfloat16 --new 32
    # So small that launching kernels is what takes time.
    row demo 40 --shape demo --rounds 3 --steps 20 --no-ceiling --compile --variant graphs model.cuda_graphs=True
fi

if [ -n "${dry_run:-}" ]; then
    exit 0
fi
report
