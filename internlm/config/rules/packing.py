"""Rules on packing, the document mask and fill-in-the-middle."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.schema import Config
from internlm.utils.packing_modes import document_mask_problem


def packing(config: Config, world_size: int) -> Iterator[Problem]:
    """InternEvo's keys and the document mask must not contradict the packing."""
    data = config.data
    contradictions = {
        "use_packed_dataset": data.use_packed_dataset != (data.packing != "unpacked"),
        # Without packing, InternEvo's key has no effect.
        "pack_sample_into_one": data.packing != "unpacked"
        and data.pack_sample_into_one != (data.packing == "pack_sample_into_one"),
    }
    for name, contradicts in contradictions.items():
        if contradicts:
            key = f"data.{name}"
            yield Problem(
                ("data.packing", key),
                f"data.packing = {data.packing!r} contradicts {key} = {getattr(data, name)}; give one of them",
            )
    if problem := document_mask_problem(data.packing, data.document_mask):
        yield Problem(("data.document_mask", "data.packing"), problem)


def fill_in_the_middle(config: Config, world_size: int) -> Iterator[Problem]:
    """The tokens of fill-in-the-middle must exist and differ."""
    data, fim = config.data, config.data.fim
    if fim is None:
        return
    if data.train_folder is None and not data.blend:
        yield Problem(
            ("data.fim", "data.train_folder"),
            "data.fim is given, but data.train_folder = None trains on random tokens; leave data.fim out",
        )
    sentinels = (fim.prefix, fim.middle, fim.suffix)
    if len(set(sentinels)) < len(sentinels):
        yield Problem(
            ("data.fim.prefix", "data.fim.middle", "data.fim.suffix"),
            f"data.fim.prefix, middle and suffix = {sentinels} must be three different tokens",
        )
    for name in ("prefix", "middle", "suffix", "bos", "eos"):
        token, key = getattr(fim, name), f"data.fim.{name}"
        if isinstance(token, str) and data.tokenizer_path is None:
            alternative = ", or None if documents have none" if name in ("bos", "eos") else ""
            yield Problem(
                (key, "data.tokenizer_path"),
                f"{key} = {token!r} needs a tokenizer; give data.tokenizer_path, or an id{alternative}",
            )
        if isinstance(token, int) and not 0 <= token < config.model.vocab_size:
            yield Problem(
                (key, "model.vocab_size"),
                f"{key} = {token} must be at least 0 and below model.vocab_size = {config.model.vocab_size}",
            )
