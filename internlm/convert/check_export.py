"""Checks an exported folder with transformers: the logits against those of the checkpoint, the tokenizer against ours.

The models are in memory one after the other, of which the largest is our own in float64: 8 bytes a parameter.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.reading import read_config
from internlm.config.schema import Config
from internlm.config.schema.root import HF_CLASS
from internlm.convert.compare_logits import (
    compare_logits,
    longest_probe,
    our_logits,
    probe_sequences,
    rounded_to,
)
from internlm.convert.findings import Finding
from internlm.convert.from_hf import decoder_of
from internlm.convert.hf_folder import CONFIG
from internlm.convert.tokenizer_files import quiet_transformers
from internlm.data.tokenize.probes import PROBE_TEXTS, special_texts
from internlm.data.tokenize.text_tokenizer import TextTokenizer
from internlm.model.architecture import Architecture
from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger
from internlm.utils.optional_packages import why_unusable
from internlm.utils.storage import StoragePath

logger = get_logger(__name__)

_MAX_TEXT_TOKENS = 256
_FROM_ROTATION = (
    "the first tokens agree and later ones do not: look at the rotary keys of config.json (rope_theta, rope_scaling), "
    "at the order of the rotary pairs of q and k, and at the sliding window"
)
_FROM_WEIGHTS = (
    "already the first token differs: look at config.json (norm epsilon, activation, tied head, head_dim) and at the "
    "names of the weights"
)


def check_prerequisites(out: StoragePath, layout: str) -> None:
    """Refuse, before the export, a check that cannot be done.

    Raises:
        ConfigError: transformers is missing, or could not load the folder.
    """
    reason = why_unusable("transformers")
    if reason is not None:
        raise ConfigError(f"--check loads the folder with transformers: {reason}; pip install transformers")
    if not out.is_local:
        raise ConfigError(f"--check: transformers loads folders on a disk; export to one first, then copy it to {out}")
    if layout == "published":
        raise ConfigError(
            "--check: the code of published checkpoints is not run; check the default --layout transformers, which has "
            "the same weights"
        )


def check_export(checkpoint: StoragePath, folder: Path, tokenizer: TextTokenizer | None) -> list[Finding]:
    """Compare an exported folder with the checkpoint, on the CPU.

    Args:
        checkpoint: holds our model.
        folder: the export, in the layout of transformers.
        tokenizer: that of the run; None: it is not known.
    """
    findings = _check_logits(checkpoint, folder, tokenizer)
    return [*findings, *_check_tokenizer(folder, tokenizer)]


def _check_logits(checkpoint: StoragePath, folder: Path, tokenizer: TextTokenizer | None) -> list[Finding]:
    import transformers

    config = read_config(checkpoint)
    values = json.loads((folder / CONFIG).read_text())
    architecture = None if config.model_type == HF_CLASS else decoder_of(config).architecture
    class_name = values["architectures"][0]
    if not hasattr(transformers, class_name):
        return [Finding("logits", "not checked", f"{class_name} is not a class of transformers {_version()}")]
    experts = None if architecture is None else architecture.experts
    if experts is not None and experts.selection.capacity is not None:
        reason = "experts have a capacity, beyond which our model drops tokens and that of transformers does not"
        return [Finding("logits", "not checked", reason)]
    file_dtype = getattr(torch, values["dtype"])
    sequences = _sequences(config, architecture, values, tokenizer)
    rounding = None if file_dtype == config.model.torch_dtype else rounded_to(file_dtype)
    exact = our_logits(checkpoint, sequences, torch.float64, rounding)
    findings = []
    for dtype in dict.fromkeys((torch.float32, file_dtype)):
        run_dtype = None if rounding is None and dtype == file_dtype else dtype
        ours = our_logits(checkpoint, sequences, run_dtype, rounding)
        subject = f"logits in {str(dtype).removeprefix('torch.')}"
        try:
            theirs = _their_logits(getattr(transformers, class_name), folder, sequences, dtype)
        except Exception as error:  # a class of transformers may raise anything
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            findings.append(Finding(subject, "failed", f"transformers cannot compute them: {reason}"))
            continue
        compared = compare_logits(
            theirs,
            ours,
            exact,
            robust=experts is not None or config.model_type == HF_CLASS,
            # The head is normalized before it is rounded, and ours after.
            additional=_epsilon(file_dtype) if architecture is not None and architecture.norm_head else 0.0,
        )
        advice = f"at {compared.place}; {_FROM_WEIGHTS if compared.place.startswith('position 0 ') else _FROM_ROTATION}"
        findings.append(Finding(subject, "passed" if compared.passed else "failed", str(compared), advice))
    if config.model_type == "LLAVA":
        reason = "the sequences are text; tests/convert/test_llava_folder.py compares features of pictures"
        findings.append(Finding("pictures", "not checked", reason))
    return [*findings, *_unchecked(architecture, sequences)]


def _sequences(
    config: Config, architecture: Architecture | None, values: dict[str, Any], tokenizer: TextTokenizer | None
) -> list[Tensor]:
    model = config.model
    context = model.context_length or model.max_position_embeddings
    longest = longest_probe(context, () if architecture is None else architecture.windows)
    vocab_size = values.get("vocab_size") or values["text_config"]["vocab_size"]
    sequences = probe_sequences(vocab_size, longest, model.image_token_id)
    if tokenizer is not None:
        ids = [id for text in tokenizer.encode_batch(list(PROBE_TEXTS)) for id in text]
        sequences.append(torch.tensor(ids[: min(_MAX_TEXT_TOKENS, context)]))
    return sequences


def _unchecked(architecture: Architecture | None, sequences: Sequence[Tensor]) -> list[Finding]:
    """What the sequences do not reach."""
    if architecture is None:
        return []
    longest = max(map(len, sequences))
    limits = {f"a window of {window:,} tokens": window for window in architecture.windows if window is not None}
    if architecture.rope.rope_type == "dynamic":
        limits["dynamic rotary positions"] = architecture.rope.max_positions
    return [
        Finding(name, "not checked", f"it acts beyond {limit:,} tokens, the longest sequence has {longest}")
        for name, limit in limits.items()
        if longest <= limit
    ]


@torch.inference_mode()
def _their_logits(kind: Any, folder: Path, sequences: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Raises: RuntimeError: a weight is missing, unexpected or of another shape."""
    with quiet_transformers():
        model, info = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, local_files_only=True)
    problems = [f"{name.replace('_', ' ')}: {sorted(map(str, found))[0]}" for name, found in info.items() if found]
    if problems:
        raise RuntimeError("; ".join(problems))
    model.eval()
    logits = [model(input_ids=sequence[None], use_cache=False).logits[0].float() for sequence in sequences]
    del model
    gc.collect()
    return logits


def _check_tokenizer(folder: Path, ours: TextTokenizer | None) -> list[Finding]:
    from transformers import AutoTokenizer

    if ours is None:
        return [Finding("tokenizer", "not checked", "the run's tokenizer is not known; give --tokenizer PATH")]
    try:
        with quiet_transformers():
            theirs: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the class named in the files may raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return [Finding("tokenizer", "failed", f"transformers cannot read it: {reason}", "Give another --tokenizer")]
    rows = _vocab_size(folder)
    texts = [*PROBE_TEXTS, *special_texts(ours)]
    problems = [*_differing_texts(theirs, ours, texts)]
    if len(theirs) > rows:
        problems.append(f"it has {len(theirs):,} tokens, the embedding only {rows:,} rows")
    if theirs.eos_token_id != ours.eos_id:
        problems.append(f"a text ends with token {ours.eos_id} in training and with {theirs.eos_token_id} here")
    advice = "Look at tokenizer_config.json (tokenizer_class, added_tokens_decoder) and tokenizer.json of the folder"
    padding = f"; the embedding has {rows - len(theirs):,} more rows than it has tokens" if len(theirs) < rows else ""
    agreement = f"ids and decoded text of {len(texts)} texts are those of the run's tokenizer{padding}"
    templates = theirs.chat_template
    return [
        Finding("tokenizer", "failed" if problems else "passed", "; ".join(problems) or agreement, advice),
        Finding("chat template", "passed", "present")
        if templates
        else Finding(
            "chat template",
            "not checked",
            "there is none: complete texts with the model, or give the server a template of its own",
        ),
    ]


def _differing_texts(theirs: Any, ours: TextTokenizer, texts: list[str]) -> list[str]:
    """The first text with other ids, and the first that is decoded otherwise."""
    problems = []
    encoded = ours.encode_batch(texts)
    for text, ids in zip(texts, encoded, strict=True):
        their_ids = theirs(text, add_special_tokens=False, verbose=False)["input_ids"]
        if their_ids != ids:
            problems.append(f"{text!r} is {ids} in training and {their_ids} here")
            break
    for ids in encoded[: len(PROBE_TEXTS)]:
        text, their_text = ours.decode(ids), theirs.decode(ids)
        if text != their_text:
            problems.append(f"{ids} is decoded to {text!r} in training and to {their_text!r} here")
            break
    return problems


def _vocab_size(folder: Path) -> int:
    values = json.loads((folder / CONFIG).read_text())
    return int(values.get("vocab_size") or values["text_config"]["vocab_size"])


def _epsilon(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


def _version() -> str:
    import transformers

    return transformers.__version__
