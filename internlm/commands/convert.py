"""`internlm convert`: converts checkpoints to and from other formats. Needs no GPU; only checks hold a whole model."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

import torch

from internlm.convert.check_export import check_export, check_prerequisites
from internlm.convert.check_gguf import check_gguf, check_gguf_prerequisites
from internlm.convert.findings import Finding, has_failed
from internlm.convert.from_hf import convert_from_hf
from internlm.convert.from_internevo import import_internevo
from internlm.convert.gguf_types import TYPES
from internlm.convert.internevo_run import schedule_differences
from internlm.convert.model_card import add_checks
from internlm.convert.to_gguf import convert_to_gguf
from internlm.convert.to_hf import convert_to_hf
from internlm.convert.upcycle import Upcycling, upcycle
from internlm.initialize.build_schedules import build_schedules
from internlm.utils.errors import ConfigError
from internlm.utils.logging import configure_logging
from internlm.utils.paths import local_path
from internlm.utils.storage import storage_path

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the directions and their options."""
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    _add_to_hf(directions.add_parser("to-hf", help="write a folder that transformers loads"))
    _add_to_gguf(directions.add_parser("to-gguf", help="write a file that llama.cpp loads"))
    _add_from_hf(directions.add_parser("from-hf", help="read a Hugging Face folder"))
    _add_from_internevo(directions.add_parser("from-internevo", help="read a checkpoint of InternEvo"))
    _add_upcycle(directions.add_parser("upcycle", help="make a mixture of experts of a dense checkpoint"))


def run(options: argparse.Namespace) -> int:
    """Convert; returns the exit code."""
    configure_logging()
    return options.convert(options)


def _add_to_hf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, metavar="DIR", help="checkpoint, or a folder of them (newest)")
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder; must be new or empty")
    parser.add_argument(
        "--layout",
        choices=("transformers", "published"),
        default="transformers",
        help="weight names of transformers' built-in classes (default), or of the family's published checkpoints",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as stored)")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="maximum size of a weight file (default: 5GB)"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer to export with the weights (default: that of the imported folder, else data.tokenizer_path of "
        "the run)",
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer")
    parser.add_argument(
        "--check",
        action="store_true",
        help="then compare logits and tokenizer of the folder, as transformers loads it, with those of the checkpoint, "
        "and write the results into its README.md; exit code 1 if they differ. Needs the memory of two copies of the "
        "model in fp32, 8 bytes a parameter",
    )
    parser.set_defaults(convert=_to_hf)


def _to_hf(options: argparse.Namespace) -> int:
    out = storage_path(options.out)
    if options.check:
        check_prerequisites(out, options.layout)
    exported = convert_to_hf(
        storage_path(options.ckpt),
        out,
        layout=options.layout,
        dtype=DTYPES.get(options.dtype),
        max_shard_bytes=parse_size(options.max_shard_size),
        tokenizer=False if options.no_tokenizer else storage_path(options.tokenizer) if options.tokenizer else None,
    )
    print(options.out)
    if not options.check:
        return 0
    findings = check_export(exported.checkpoint, out.local, exported.tokenizer)
    add_checks(out, findings)
    return _report(findings)


def _add_to_gguf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, metavar="DIR", help="checkpoint, or a folder of them (newest)")
    parser.add_argument("--out", required=True, type=local_path, metavar="FILE.gguf", help="file to write; must be new")
    parser.add_argument("--type", required=True, choices=TYPES, help="number format of matrices; vectors are f32")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer to write into the file (default: that of the imported folder, else data.tokenizer_path of the "
        "run)",
    )
    parser.add_argument(
        "--pre-tokenizer",
        metavar="NAME",
        help="llama.cpp's name of the rule that splits text before byte-level BPE (default: by the pattern of the "
        "tokenizer.json)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="then load the file with llama.cpp (package xllamacpp), and compare log-probabilities and token ids with "
        "those of the checkpoint; exit code 1 if they differ. Needs 8 bytes of memory a parameter",
    )
    parser.set_defaults(convert=_to_gguf)


def _to_gguf(options: argparse.Namespace) -> int:
    if options.check:
        check_gguf_prerequisites()
    exported = convert_to_gguf(
        storage_path(options.ckpt),
        options.out,
        file_type=options.type,
        tokenizer=storage_path(options.tokenizer) if options.tokenizer else None,
        pre_tokenizer=options.pre_tokenizer,
    )
    print(options.out)
    if not options.check:
        return 0
    assert exported.tokenizer is not None
    return _report(check_gguf(exported.checkpoint, options.out, options.type, exported.tokenizer))


def _report(findings: Sequence[Finding]) -> int:
    """Print findings; returns the exit code."""
    for finding in findings:
        print(finding)
    return int(has_failed(findings))


def _add_from_hf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf", required=True, metavar="DIR", help="folder with config.json and weights")
    parser.add_argument("--out", required=True, metavar="DIR", help="save folder in which checkpoint 0/ is created")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as stored)")
    parser.add_argument(
        "--untie",
        action="store_true",
        help="give the model an untied head although config.json ties it to the embedding",
    )
    parser.set_defaults(convert=_from_hf)


def _from_hf(options: argparse.Namespace) -> int:
    source, out = storage_path(options.hf), storage_path(options.out)
    print(convert_from_hf(source, out, dtype=DTYPES.get(options.dtype), untie=options.untie))
    return 0


def _add_from_internevo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, metavar="DIR", help="folder with model_tp0_pp0.pt or model_wp0_pp0.pt")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="save folder in which checkpoint <step>/ is created"
    )
    parser.add_argument(
        "--config",
        type=local_path,
        metavar="FILE.py",
        help="config of the run (default: the one in the checkpoint, which is executed as Python)",
    )
    parser.add_argument("--model-type", metavar="NAME", help="model family, if no config names it")
    parser.add_argument("--weights-only", action="store_true", help="skip masters, moments and counters")
    parser.set_defaults(convert=_from_internevo)


def _from_internevo(options: argparse.Namespace) -> int:
    ckpt, out = storage_path(options.ckpt), storage_path(options.out)
    if not ckpt.is_local:
        raise ConfigError(f"--ckpt {ckpt}: the files are memory-mapped; copy the folder to a local disk first")
    imported = import_internevo(
        ckpt.local,
        out,
        config_file=options.config,
        model_type=options.model_type,
        weights_only=options.weights_only,
    )
    print(f"InternEvo checkpoint of {imported.layout}")
    for name in ("step_count", "batch_count", "num_consumed_tokens", "inf_nan_skip_batches"):
        if name in imported.counters:
            print(f"  {name}: {int(imported.counters[name]):,}")
    lr, beta2 = build_schedules(imported.config)
    notices = [*imported.notices, *schedule_differences(imported.options, imported.step, lr.lr, beta2.beta2)]
    for notice in notices:
        print(f"notice: {notice}")
    print(imported.path)
    return 0


def _add_upcycle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, metavar="DIR", help="dense checkpoint, or a folder of them (newest)")
    parser.add_argument("--out", required=True, metavar="DIR", help="save folder in which checkpoint 0/ is created")
    parser.add_argument("--num-experts", required=True, type=int, metavar="N", help="routed experts of a layer")
    parser.add_argument("--top-k", required=True, type=int, metavar="K", help="experts of a token")
    parser.add_argument(
        "--noise",
        default=0.0,
        type=float,
        metavar="X",
        help="add noise to the experts, with X times the standard deviation of each weight (default: exact copies)",
    )
    parser.add_argument(
        "--shared-expert", action="store_true", help="add a shared expert, which starts as the dense block, too"
    )
    parser.add_argument(
        "--dense-layers", default=0, type=int, metavar="N", help="the first N layers stay dense (default: 0)"
    )
    parser.add_argument("--seed", default=1024, type=int, help="of routers and noise (default: 1024)")
    parser.set_defaults(convert=_upcycle)


def _upcycle(options: argparse.Namespace) -> int:
    settings = Upcycling(
        options.num_experts,
        options.top_k,
        noise=options.noise,
        shared_expert=options.shared_expert,
        dense_layers=options.dense_layers,
        seed=options.seed,
    )
    made = upcycle(storage_path(options.ckpt), storage_path(options.out), settings)
    for notice in made.notices:
        print(f"notice: {notice}")
    print("keys of the mixture, whose config otherwise is that of the dense model:")
    print(f"  model_type = {made.model_type!r}")
    for name, value in made.keys.items():
        print(f"  model.{name} = {value!r}")
    print(f"  ckpt.load_ckpt_info = dict(path={str(made.path)!r}, content=('model',))")
    print(made.path)
    return 0


def parse_size(text: str) -> int:
    """Bytes of '5GB', '500MB' or '2GiB'.

    Raises:
        ConfigError: the text has another form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".find(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise ConfigError(f"--max-shard-size: '{text}' is not a size; write it as 5GB, 500MB or 2GiB")
    return size
