"""Training speed and memory of a model shape, against alternatives to this project, in one run on one machine.

    python benchmarks/throughput.py --shape cpu-768 --precision bf16 --against hf hf-trainer --threads 2
    python benchmarks/throughput.py --shape 7b-layers --compile --variant fp8 float8.enable_float8_linear=True

Every contender trains on the same tokens in its own process, so that its memory can be measured. Rounds alternate, so
that other load on the machine affects all contenders. Between rounds the GEMMs of the model are timed alone: the
ceiling. Compilation takes a contender 40 to 60 seconds on a CPU, or 10 with a warm compiler cache.

`ours` is the engine and the loader that a config builds; `--variant NAME KEY=VALUE ...` adds ours with other keys
(`documents=short` is a key of this script). benchmarks/README.md explains how to read the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from speed.corpus import write_corpus
from speed.report import add_ratios, make_row, markdown
from speed.shapes import DOCUMENTS, PRECISIONS, SHAPES, keys_of, write_config

from internlm.config.loader import load_config
from internlm.utils.errors import ConfigError

OURS = "ours"
PEERS = {
    "hf": "transformers' Llama, Qwen3-MoE or the class of ours in a loop: bf16 weights, fused AdamW, torch.compile",
    "hf-eager": "the same, uncompiled",
    "hf-packed-eager": "the same, uncompiled, with documents told apart by their positions in one packed row",
    "hf-padded-eager": "the same, uncompiled, with a padded row for each document",
    "hf-autocast": "the same with fp32 weights and bf16 autocast, compiled",
    "hf-autocast-eager": "the same, uncompiled",
    "hf-trainer": "transformers' Trainer with bf16=True and default settings",
    "plain": "a handwritten decoder (plain_pytorch.py), bf16 autocast, fused AdamW",
    "plain-compile": "the same with torch.compile",
}
"""Peers compute in fp32 with precision fp32, and in bf16 with bf16 or fp8."""
CEILING = "ceiling"
WARMUP_STEPS = 3
STEPS_OF_DATA = 8


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    peers = "peers for --against:\n" + "".join(f"  {name:<18} {text}\n" for name, text in PEERS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=peers, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument(
        "--documents", choices=DOCUMENTS, default="one", help="lengths of documents, see speed/shapes.py"
    )
    for name, text in (
        ("seq", "tokens per sequence"),
        ("micro-bsz", "sequences per micro-batch"),
        ("micro-num", "micro-batches per step"),
        ("layers", "layers of the model"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"{text} (default: that of the shape)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="same as --set model.compile=True or False"
    )
    parser.add_argument("--checkpoint", type=float, help="share of layers whose activations are recomputed")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override keys of the config"
    )
    parser.add_argument(
        "--variant", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"), help="ours with other keys"
    )
    parser.add_argument("--against", nargs="*", choices=PEERS, default=[], metavar="PEER", help="see below")
    parser.add_argument("--hf-attention", default="sdpa", help="transformers' attn_implementation (default: sdpa)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps per round")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each contender")
    parser.add_argument("--no-ceiling", action="store_true", help="do not time the GEMMs")
    parser.add_argument("--one-by-one", action="store_true", help="run contenders one after the other, not interleaved")
    parser.add_argument("--title", help="title of the table")
    parser.add_argument("--json", type=Path, help="output file for the numbers")
    parser.add_argument("--markdown", type=Path, help="output file for the table")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    # A contender's process gets --serve alone.
    return parser.parse_args(["--shape", "tiny", *sys.argv[1:]] if "--serve" in sys.argv else arguments)


class Contender:
    """A process that runs rounds on request.

    Args:
        name: in the table.
        kind: `OURS`, `CEILING` or one of `PEERS`.
        config_file: config of its training.
        overrides: `KEY=VALUE` for the config.
        options: of the command line.

    Attributes:
        facts: its first answer, when it is ready.
        rounds: its answers, one per round.
        error: why it no longer runs, in one line.
    """

    def __init__(
        self, name: str, kind: str, config_file: Path, overrides: list[str], options: argparse.Namespace
    ) -> None:
        self.name, self.config_file, self.overrides = name, config_file, overrides
        self._task = {
            "kind": kind,
            "config_file": str(config_file),
            "overrides": overrides,
            "attention": options.hf_attention,
            "threads": options.threads,
        }
        self.facts: dict[str, Any] = {}
        self.rounds: list[dict[str, Any]] = []
        self.error: str | None = None
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Build and warm up, unless there already is an error."""
        if self.error is not None:
            return
        folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self._task["threads"]),
            "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", json.dumps(self._task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.facts = self._answer()

    def run_round(self, steps: int) -> None:
        """Run `steps` steps and append the result to `rounds`."""
        if self.error is not None:
            return
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer contains the reason
        answer = self._answer()
        if self.error is None:
            self.rounds.append(answer)

    def end(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process ended with code {self._process.wait()}"}
        if "error" in answer:
            self.error = answer["error"]
            print(f"{self.name}: {self.error}", file=sys.stderr)
            self.end()
        return answer


def serve(task: dict[str, Any]) -> None:
    """Run a contender's process: its output goes to stderr, its answers to stdout."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import torch
    from speed.ceiling import Ceiling
    from speed.contenders import device_of_this_machine, train_ours, train_peer
    from speed.pacer import Finished, Pacer

    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    device = device_of_this_machine()
    config_file, kind = Path(task["config_file"]), task["kind"]
    if kind.startswith("hf"):
        import transformers  # noqa: F401  keeps the memory of the import out of the model's
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {task['threads']} thread(s)"
    pacer = Pacer(out, device, WARMUP_STEPS, {"device": name, "torch": torch.__version__})
    try:
        if kind == CEILING:
            pacer.serve(Ceiling(config_file, task["overrides"], device).measure)
        elif kind == OURS:
            train_ours(config_file, task["overrides"], pacer)
        else:
            train_peer(kind, config_file, task["overrides"], task["attention"], pacer)
    except Finished:
        pass
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip().splitlines() or [""]
        out.write(json.dumps({"error": f"{type(error).__name__}: {text[0][:200]}"}) + "\n")
        out.flush()


def make_contenders(options: argparse.Namespace, folder: Path) -> list[Contender]:
    """Create the contenders without starting them; the first is the ceiling, the second ours.

    Raises:
        ConfigError: the config of ours is invalid. For a variant this is stored as its error.
    """
    shape = SHAPES[options.shape]
    overrides = list(options.set)
    if options.compile is not None:
        overrides.append(f"model.compile={options.compile}")
    if options.checkpoint is not None:
        overrides.append(f"model.checkpoint={options.checkpoint}")

    def config_file(documents: str) -> Path:
        home = folder / documents
        if not home.exists():
            home.mkdir()
            keys = keys_of(
                shape,
                options.precision,
                seq=options.seq,
                micro_bsz=options.micro_bsz,
                micro_num=options.micro_num,
                layers=options.layers,
                documents=documents,
                folder=str(home / "train"),
            )
            data = keys["data"]
            write_config(home / "config.py", keys)
            num_sequences = STEPS_OF_DATA * data["micro_bsz"] * data["micro_num"]
            write_corpus(home, documents, vocab=shape.vocab, seq=data["seq_len"], num_sequences=num_sequences)
        return home / "config.py"

    contenders = [Contender(OURS, OURS, config_file(options.documents), overrides, options)]
    for name, *keys in options.variant:
        documents = [key.partition("=")[2] for key in keys if key.startswith("documents=")] or [options.documents]
        if documents[-1] not in DOCUMENTS:
            raise ConfigError(f"--variant {name}: documents={documents[-1]} is not one of {', '.join(DOCUMENTS)}")
        own = [*overrides, *(key for key in keys if not key.startswith("documents="))]
        contenders.append(Contender(f"{OURS}, {name}", OURS, config_file(documents[-1]), own, options))
    for contender in contenders:
        try:
            load_config(contender.config_file, contender.overrides)
        except ConfigError as error:
            if contender is contenders[0]:
                raise
            contender.error = str(error)
    peers = [Contender(name, name, config_file(options.documents), overrides, options) for name in options.against]
    ceiling = Contender(CEILING, CEILING, config_file(options.documents), overrides, options)
    return [ceiling, *contenders, *peers]


def measure(contenders: list[Contender], options: argparse.Namespace) -> None:
    """Run all rounds, interleaved or one contender after the other; SIGTERM gives unfinished contenders an error."""
    groups = [[contender] for contender in contenders] if options.one_by_one else [contenders]
    signal.signal(signal.SIGTERM, _raise_out_of_time)
    try:
        for group in groups:
            for contender in group:
                contender.start()
            for _ in range(options.rounds):
                for contender in group:
                    contender.run_round(options.steps)
            for contender in group:
                contender.end()
    except OutOfTime:
        for contender in contenders:
            if len(contender.rounds) < options.rounds:
                contender.error = contender.error or "out of time"
    finally:
        for contender in contenders:
            contender.end()


class OutOfTime(Exception):  # noqa: N818  not an error of the program
    """The process received SIGTERM."""


def _raise_out_of_time(*_: object) -> None:
    raise OutOfTime


def main() -> None:
    options = parse_options()
    if options.serve:
        serve(json.loads(options.serve))
        return
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        try:
            contenders = make_contenders(options, Path(folder))
        except ConfigError as error:
            sys.exit(f"error: {error}")
        measure(contenders[1:] if options.no_ceiling else contenders, options)
    ceiling, ours, *_ = contenders
    rows = []
    for contender in contenders[1:]:
        error = contender.error or ours.error
        if error is not None:
            rows.append({"contender": contender.name, "error": error if contender.error else "ours failed"})
            continue
        of_model = ("flops_full", "flops_causal", "peak_flops")
        facts = {**{key: ours.facts[key] for key in of_model if key in ours.facts}, **contender.facts}
        tokens = contender.facts["tokens_per_step"]
        rows.append(make_row(contender.name, contender.rounds, facts, ceiling.rounds, tokens))
    add_ratios(rows)
    result = {
        "title": options.title or f"{options.shape}, {options.precision}, {options.documents}",
        "command": shlex.join(["python", "benchmarks/throughput.py", *sys.argv[1:]]),
        "commit": _commit(),
        "device": ours.facts.get("device", "unknown"),
        "torch": ours.facts.get("torch", "unknown"),
        "rows": rows,
        "ceiling": ceiling.rounds,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    page = markdown(result)
    if options.markdown:
        options.markdown.write_text(page, encoding="utf-8")
    print(page)
    if "error" in rows[0]:
        sys.exit(1)


def _commit() -> str:
    """Commit of the checkout, if there is one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    main()
