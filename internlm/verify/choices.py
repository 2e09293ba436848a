"""What may differ between two runs that are compared, as small records with a one-line text form.

The text form, such as `tensor=2,mode=isp,weight=4`, is what `internlm verify --layout` takes and the fuzzer prints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from internlm.config.schema import Config
from internlm.utils.errors import ConfigError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class LayoutChoices:
    """How a run is spread over its ranks, by the keys of the config.

    Attributes:
        tensor, mode: `parallel.tensor`.
        weight: `parallel.weight.size`.
        overlap: `parallel.weight.overlap`.
        pipeline, schedule: `parallel.pipeline`.
        chunks: `model.num_chunks`.
        zero: `parallel.zero1.size`.
        fsdp: `parallel.fsdp.enable`.
    """

    tensor: int = 1
    mode: Literal["mtp", "msp", "fsp", "isp"] = "mtp"
    weight: int = 1
    overlap: bool = False
    pipeline: int = 1
    schedule: Literal["1F1B", "ZBH1", "ZBV", "DUALPIPEV"] = "1F1B"
    chunks: int = 1
    zero: int = -1
    fsdp: bool = False

    @classmethod
    def of(cls, config: Config) -> LayoutChoices:
        """The layout that a config asks for."""
        parallel = config.parallel
        return cls(
            tensor=parallel.tensor.size,
            mode=parallel.tensor.mode,
            weight=parallel.weight.size,
            overlap=parallel.weight.overlap,
            pipeline=parallel.pipeline.size,
            schedule=parallel.pipeline.mode,
            chunks=config.model.num_chunks,
            zero=parallel.zero1.size,
            fsdp=parallel.uses_fsdp,
        )

    def keys(self) -> dict[str, Any]:
        """The config's keys, by dotted path, that make this layout."""
        return {
            "parallel.tensor.size": self.tensor,
            "parallel.tensor.mode": self.mode,
            "parallel.weight.size": self.weight,
            "parallel.weight.overlap": self.overlap,
            "parallel.pipeline.size": self.pipeline,
            "parallel.pipeline.mode": self.schedule,
            "model.num_chunks": self.chunks,
            "parallel.zero1.size": self.zero,
            "parallel.zero1.fsdp": False,
            "parallel.fsdp.enable": self.fsdp,
        }


@dataclass(frozen=True)
class ModelChoices:
    """The features of a model that meet parallelism; sizes are chosen small.

    Attributes:
        family: `model_type`.
        heads, kv_heads: query heads and key-value heads.
        layers: 0 for one a chunk of a pipeline stage, two at least.
        vocab: size of the vocabulary.
        tied, norm_head, qk_norm, bias: flags of `model`; None is the family's choice. `bias` is of qkv, wo and the MLP.
        fused: one weight for q, k and v, and one for both inputs of the MLP; None is the family's choice.
        split_hidden: `model.embed_split_hidden`.
        checkpoint: share of the layers that are recomputed in backward.
        keep: save policy of these layers, `model.checkpoint_save_policy`.
        dtype: of weights and computation.
        fp32_norm, fp32_residual: `use_fp32_norm` and `model.residual_in_fp32`.
        float8: `float8.enable_float8_linear`, in every layer; goes with float64.
    """

    family: str = "INTERNLM2"
    heads: int = 4
    kv_heads: int = 4
    layers: int = 0
    vocab: int = 64
    tied: bool | None = None
    norm_head: bool | None = None
    qk_norm: bool | None = None
    bias: bool | None = None
    fused: bool | None = None
    split_hidden: bool = True
    checkpoint: float = 0.0
    keep: Literal["nothing", "attention", "matmuls"] = "nothing"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    fp32_norm: bool = False
    fp32_residual: bool = False
    float8: bool = False


@dataclass(frozen=True)
class BatchChoices:
    """What a global batch is made of, apart from its sizes.

    Attributes:
        packed: documents behind one another in one row; else one padded document a row.
        ragged: documents of random length, one token the shortest; else of `data.seq_len` tokens.
        masked: which labels contribute no loss: none; a different share of each micro batch; every third micro batch
            whole; the last three quarters of each micro batch (whole ranks under sequence parallelism); or all.
    """

    packed: bool = True
    ragged: bool = True
    masked: Literal["none", "uneven", "micro_batches", "ends", "all"] = "uneven"


PARAMETER_GROUPS: Mapping[str, list[dict[str, Any]]] = {
    "none": [],
    "frozen_ends": [{"match": "tok_embeddings.*", "freeze": True}, {"match": "norm.*", "freeze": True}],
    "frozen_layer": [
        {"match": "tok_embeddings.*", "freeze": True},
        {"match": "layers.0.*", "freeze": True},
        {"match": "layers.1.*", "lr_factor": 0.5, "weight_decay": 0.3},
    ],
    "factors": [{"match": "*norm*", "lr_factor": 0.5}, {"match": "layers.0.*", "lr_factor": 2.0, "weight_decay": 0.0}],
}
"""Name -> `optimizer.groups`, of names that every family has."""


@dataclass(frozen=True)
class StepChoices:
    """How an optimizer step is made of micro batches, and what the optimizer does.

    Attributes:
        micro_batches: of one step, on all data ranks together; 0 for what the pipeline's schedule needs.
        clip: largest norm of the gradient; 0 leaves it as it is.
        bucket: elements of a gradient bucket.
        overlap_grad, overlap_param: `hybrid_zero_optimizer.overlap_sync_grad` and `overlap_sync_param`.
        reduce_bf16: gradients are reduced in bf16.
        grad_bf16: gradients are accumulated in bf16.
        moments_bf16: moments are kept in bf16.
        offload: masters and moments are kept on the host; not in the run in one process.
        groups: a set of `optimizer.groups`, see `PARAMETER_GROUPS`.
    """

    micro_batches: int = 0
    clip: float = 0.5
    bucket: int = 3000
    overlap_grad: bool = False
    overlap_param: bool = False
    reduce_bf16: bool = False
    grad_bf16: bool = False
    moments_bf16: bool = False
    offload: bool = False
    groups: Literal["none", "frozen_ends", "frozen_layer", "factors"] = "none"


def to_text(choices: Any) -> str:
    """`name=value` of all that differs from the default, joined by commas."""
    parts = []
    for field in dataclasses.fields(choices):
        value = getattr(choices, field.name)
        if value != field.default:
            parts.append(f"{field.name}={str(value).lower() if isinstance(value, bool) else value}")
    return ",".join(parts)


def from_text(cls: type[T], text: str) -> T:
    """What `to_text` wrote.

    Args:
        cls: one of the classes above.
        text: a flag that is to be on may stand without `=true`.

    Raises:
        ConfigError: an unknown name, or a value that is not of its kind; all of them together.
    """
    hints = get_type_hints(cls)
    values, mistakes = {}, []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if name not in hints:
            mistakes.append(f"'{part}': unknown name '{name}', known: {', '.join(hints)}.{nearest(name, hints)}")
            continue
        try:
            values[name] = _parse(hints[name], value if equals else "true")
        except ValueError as error:
            mistakes.append(f"'{part}': {error}")
    if mistakes:
        raise ConfigError(mistakes)
    return cls(**values)


def _parse(kind: Any, text: str) -> Any:
    if kind in (bool, bool | None):
        if text.lower() not in ("true", "false"):
            raise ValueError("expected true or false")
        return text.lower() == "true"
    if kind in (int, float, str):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"expected {'a whole number' if kind is int else 'a number'}") from None
    choices = get_args(kind)
    for choice in choices:
        if choice.lower() == text.lower():
            return choice
    raise ValueError(f"expected one of {', '.join(choices)}.{nearest(text, choices)}")
