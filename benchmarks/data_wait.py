"""Share of a training step that waits for data, for each kind of data, with one loader worker.

    python benchmarks/data_wait.py [--steps 150]

Trains configs/demo.py with `internlm train`, one run after the other on the same text: tokenized files, a Megatron
dataset, an array, parquet that is tokenized on the way, and a blend of all of them. The share is the sum of `data_time`
over that of `total_time` in metrics.jsonl, without the first --warmup steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tokenized_files.reader import TokenizedFile

ROOT = Path(__file__).resolve().parent.parent


def prepare(folder: Path) -> dict[str, dict[str, Any]]:
    """Write the demo's corpus in every format; the keys of the data section of each kind."""
    import pyarrow
    import pyarrow.parquet

    _run(str(ROOT / "tools" / "prepare_demo_data.py"), "--out", str(folder / "demo"))
    train, tokenizer_path = folder / "demo" / "train", folder / "demo" / "tokenizer.json"
    _run("-m", "internlm.cli", "data", "convert", str(train), "--to", "megatron", "--output", str(folder / "m.bin"))
    _run("-m", "internlm.cli", "data", "convert", str(train), "--to", "arrays", "--output", str(folder / "a.ds"))
    tokenizer = load_tokenizer(tokenizer_path)
    files = [TokenizedFile(path) for path in sorted(train.rglob("*.bin"))]
    texts = [tokenizer.decode(file.read(number)[0][:-1].tolist()) for file in files for number in range(len(file))]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "rows.parquet", row_group_size=1000)
    kinds: dict[str, dict[str, Any]] = {
        "tokenized": {"train_folder": str(train)},
        "megatron": {"type": "megatron", "train_folder": str(folder / "m.bin")},
        "arrays": {"type": "arrays", "train_folder": str(folder / "a.ds")},
        "streaming parquet": {"type": "streaming", "train_folder": str(folder / "rows.parquet")},
    }
    entries = [
        {"path": keys["train_folder"], "type": keys.get("type", "tokenized"), "name": name, "weight": 1}
        for name, keys in kinds.items()
    ]
    return {**kinds, "blend of the four": {"blend": entries, "train_folder": None}}


def share(folder: Path, keys: dict[str, Any], steps: int, warmup: int, threads: int) -> tuple[float, float]:
    """(share of the time that waits for data, seconds per step)."""
    config = folder / "config.py"
    data = keys | {"tokenizer_path": str(folder / "demo" / "tokenizer.json"), "total_steps": steps}
    data |= {"valid_folder": None, "valid_every": 0, "num_worker": 1}
    config.write_text(
        (ROOT / "configs" / "demo.py").read_text() + f"data.update({data!r})\nckpt = dict(enable_save_ckpt=False)\n"
    )
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        _run(
            "-m", "internlm.cli", "train", "--config", str(config), "--run-dir", run_dir,
            environment={"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    numbers = [line for line in map(json.loads, lines) if "data_time" in line][warmup:]
    total = sum(line["total_time"] for line in numbers)
    return sum(line["data_time"] for line in numbers) / total, total / len(numbers)


def _run(*arguments: str, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Share of a step that waits for data.")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1, help="of the training process")
    parser.add_argument("--folder", type=Path, help="for the data, which an existing folder has already")
    parser.add_argument("--only", nargs="*", help="kinds to measure")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        known = folder / "kinds.json"
        if not known.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            known.write_text(json.dumps(prepare(folder)))
        print("| data | share of a step | step |\n|---|---|---|")
        for kind, keys in json.loads(known.read_text()).items():
            if args.only is None or kind in args.only:
                waits, seconds = share(folder, keys, args.steps, args.warmup, args.threads)
                print(f"| {kind} | {waits:.2%} | {1000 * seconds:.0f} ms |", flush=True)


if __name__ == "__main__":
    main()
