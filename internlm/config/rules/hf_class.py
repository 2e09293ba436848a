"""Rules on classes of transformers: what they cannot do is refused before they are built."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.schema import Config
from internlm.config.schema.root import HF_CLASS

_BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary scaling that transformers chooses by the longest document of a micro-batch."""


def hf_class(config: Config, world_size: int) -> Iterator[Problem]:
    """The `hf` section belongs to `model_type = "hf"`, and layouts must be those that any class allows."""
    if config.model_type != HF_CLASS:
        if config.hf.folder is not None or config.hf.cfg is not None:
            key = "hf.folder" if config.hf.folder is not None else "hf.cfg"
            yield Problem(
                (key, "model_type"),
                f"{key} names a class of transformers, but model_type = {config.model_type!r}; set model_type = "
                f"{HF_CLASS!r}, or leave {key} out",
            )
        return
    assert config.model.hf_class is not None
    rope = config.model.hf_class["config"].get("rope_parameters") or {}
    rope_type = rope.get("rope_type") if isinstance(rope, dict) else None
    if rope_type in _BY_LENGTH and (config.data.use_packed_dataset or config.data.micro_bsz > 1):
        key = "data.use_packed_dataset" if config.data.use_packed_dataset else "data.micro_bsz"
        fix = False if config.data.use_packed_dataset else 1
        yield Problem(
            (key, "hf.folder"),
            f"{key} = {not fix if key.endswith('dataset') else config.data.micro_bsz}: the class rotates all documents "
            f"of a micro-batch by the length of the longest one (rope_type = {rope_type!r}); set it to {fix}",
        )
    tensor = config.parallel.tensor
    if tensor.size > 1 and tensor.mode in ("msp", "fsp"):
        yield Problem(
            ("parallel.tensor.mode", "model_type"),
            f"parallel.tensor.mode = {tensor.mode!r}: attention of a Hugging Face class reads the shape of its output "
            "from that of its input, which these modes change; use 'isp' or 'mtp'",
        )
    if config.float8.enable_float8_linear:
        yield Problem(
            ("float8.enable_float8_linear", "model_type"),
            "float8.enable_float8_linear = True: float8 is not supported in Hugging Face classes; set it to False",
        )
