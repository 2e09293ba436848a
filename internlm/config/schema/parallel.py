"""The `parallel` section: how the ranks are laid out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from internlm.config.schema.base import Section, key, later, no_effect, section, used_with

PipelineMode = Annotated[
    Literal["1F1B", "ZBH1", "ZBV", "DUALPIPEV"],
    BeforeValidator(lambda mode: mode.upper() if isinstance(mode, str) else mode),
]


class Zero1Config(Section):
    """Sharding of the optimizer's state."""

    size: int = key(-1, "Ranks that share one optimizer state; -1 (or any value <= 0): all data ranks; 1: no sharding.")
    fsdp: bool = key(False, "Shard the parameters too: the older spelling of parallel.fsdp.enable.")


class TensorConfig(Section):
    """Tensor or sequence parallelism."""

    size: int = key(1, "Ranks of a tensor (isp: sequence) group.", ge=1)
    mode: Literal["mtp", "msp", "fsp", "isp"] = key(
        "mtp", "How a group splits the work, see doc/parallelism.md; irrelevant at size 1."
    )


class PipelineConfig(Section):
    """Pipeline parallelism."""

    size: int = key(1, "Pipeline stages.", ge=1)
    mode: PipelineMode = used_with(
        "1F1B",
        "Schedule, not case-sensitive; 1F1B with model.num_chunks above 1 is interleaved, ZBV and DUALPIPEV have 2 "
        "chunks.",
        "parallel.pipeline.size",
    )
    layer_split: Literal["uniform", "cost"] | tuple[int, ...] = used_with(
        "uniform",
        "Layers of each stage: uniform: equal numbers; cost: balanced with the cost of embedding and head; or a list "
        "of numbers, one for each chunk of each stage in the order of the layers.",
        "parallel.pipeline.size",
    )
    use_zeropp: bool = later(False, "InternEvo's ZeroPP.", "the ZeroPP schedule")
    decouple_grad: bool = used_with(
        False, "ZeroPP: compute weight gradients separately.", "parallel.pipeline.use_zeropp"
    )
    interleaved_overlap: bool = no_effect(
        False, "Overlap messages with computation, when interleaved.", "messages always overlap with computation"
    )

    @property
    def forced_num_chunks(self) -> int | None:
        """The model chunks per stage if the schedule determines them: no pipeline, or a V-shaped one."""
        if self.size == 1:
            return 1
        return 2 if self.mode in ("ZBV", "DUALPIPEV") else None


def _weight_keys(owner: str) -> dict[str, Any]:
    """The keys that refine a weight-parallel group; `owner` is the dotted path of its section."""
    size, overlap = f"{owner}.size", f"{owner}.overlap"
    return {
        "overlap": used_with(False, "Gather weights and reduce gradients while computing.", size),
        "before": used_with("wo", "Module before which the next layer's gather starts.", overlap),
        "per": used_with("layer", "Gather ahead by layer or by module.", overlap),
        "early": used_with(True, "Release a reduced gradient as soon as the next one is reduced.", overlap),
        "pool": used_with(False, "Reuse the buffers of gathered weights.", size),
        "fuse": no_effect(
            False, "One gather for all weights of a layer.", "weights that share an input are always gathered together"
        ),
    }


_WEIGHT = _weight_keys("parallel.weight")
_EXPERT_WEIGHT = _weight_keys("parallel.expert_weight")


class WeightConfig(Section):
    """Weight parallelism (isp): each rank holds a shard of every weight."""

    size: int = key(1, "Ranks that share one copy of the weights; above 1 only with parallel.tensor.mode 'isp'.", ge=1)
    overlap: bool = _WEIGHT["overlap"]
    launch_allgather_before: Literal["wqkv", "attn", "wo", "w1"] = _WEIGHT["before"]
    forward_overlap_per: Literal["layer", "module"] = _WEIGHT["per"]
    early_reduce_scatter_release: bool = _WEIGHT["early"]
    memory_pool: bool = _WEIGHT["pool"]
    layer_fuse_isp_comm: bool = _WEIGHT["fuse"]


class ExpertWeightConfig(Section):
    """Weight parallelism of the experts."""

    size: int = key(1, "Ranks that share one copy of the experts; above 1 only with parallel.tensor.mode 'isp'.", ge=1)
    overlap: bool = _EXPERT_WEIGHT["overlap"]
    launch_allgather_before: Literal["wqkv", "attn", "wo", "w1"] = _EXPERT_WEIGHT["before"]
    forward_overlap_per: Literal["layer", "module"] = _EXPERT_WEIGHT["per"]
    early_reduce_scatter_release: bool = _EXPERT_WEIGHT["early"]
    memory_pool: bool = _EXPERT_WEIGHT["pool"]
    layer_fuse_isp_comm: bool = _EXPERT_WEIGHT["fuse"]


class ExpertConfig(Section):
    """Expert parallelism."""

    size: int = used_with(
        -1,
        "Ranks over which the experts of a layer are dealt; -1: as many of a stage as possible, or 1 with FSDP.",
        "model.num_experts",
    )
    no_tp: bool = used_with(
        True,
        "Experts are whole. False: each is split over the tensor group (mtp, msp, fsp).",
        "model.num_experts",
    )


class ExpertZero1Config(Section):
    """Sharding of the experts' optimizer state."""

    size: int = used_with(-1, "Ranks that share the state of one expert; -1: all that hold it.", "model.num_experts")


class ContextConfig(Section):
    """Context parallelism: the tokens of a sample are dealt to ranks, which exchange keys and values in attention."""

    size: int = key(1, "Context ranks; parallel.tensor is inside each of them. See doc/context.md.", ge=1)
    cut: Literal["auto", "contiguous", "zigzag", "document_zigzag"] = key(
        "auto",
        "Tokens of a context rank: consecutive ones, two parts of the sample, or two parts of each document; auto: the "
        "cut with the shortest attention, sample by sample.",
    )
    exchange: Literal["auto", "ring", "direct", "all_gather"] = key(
        "auto",
        "How keys and values travel: around a ring, straight to the ranks that need them, or all at once; auto: "
        "straight, with windows in a double ring.",
    )
    window_size: int = key(1, "Context ranks of an inner ring; above 1: a double ring.", ge=1)


class DevicePlacementConfig(Section):
    """Order of head and context ranks in 2D sequence parallelism."""

    head_first: bool = used_with(True, "Neighbouring ranks share heads, not context.", "parallel.sequence_2D.enable")
    interleaved: bool = used_with(False, "Interleave the ranks of a window.", "parallel.sequence_2D.enable")


class Sequence2DConfig(Section):
    """Sequence parallelism over heads and context."""

    enable: bool = key(False, "Split attention over heads and context (isp); instead of parallel.context.")
    head_size: int = used_with(
        1, "Ranks over heads; times context_size: parallel.tensor.size.", "parallel.sequence_2D.enable", ge=1
    )
    context_size: int = used_with(1, "Ranks over the sequence.", "parallel.sequence_2D.enable", ge=1)
    window_size: int = used_with(
        1, "Context ranks of an inner ring; above 1: a double ring.", "parallel.sequence_2D.enable", ge=1
    )
    device_placement_strategy: DevicePlacementConfig = section(DevicePlacementConfig, "Order of the ranks.")

    @model_validator(mode="after")
    def _fill(self) -> Sequence2DConfig:
        whole = self.window_size >= 8 or self.window_size == self.context_size
        if self.enable and whole and self.device_placement_strategy.interleaved:
            head_first = self.device_placement_strategy.head_first
            self._derive(device_placement_strategy=DevicePlacementConfig(head_first=head_first, interleaved=False))
        return self


class FsdpConfig(Section):
    """Fully sharded data parallelism."""

    enable: bool = key(
        False, "Also shard parameters and gradients over the ranks that share one optimizer state (zero1.size)."
    )
    mode: Literal["v1", "v2"] = no_effect(
        "v2", "Generation of torch's FSDP.", "torch's fully_shard, which is v2, is always used"
    )
    init_method: Literal["cuda", "cpu", "meta"] = no_effect(
        "meta",
        "Device to create parameters on.",
        "models are built on the meta device, then materialized",
    )


class ParallelConfig(Section):
    """Sizes and modes of the groups. The data-parallel size is what remains of the world size."""

    zero1: Zero1Config = section(Zero1Config, "Sharding of the optimizer's state.")
    tensor: TensorConfig = section(TensorConfig, "Tensor or sequence parallelism.")
    pipeline: PipelineConfig = section(PipelineConfig, "Pipeline parallelism.")
    weight: WeightConfig = section(WeightConfig, "Weight parallelism (isp).")
    expert: ExpertConfig = section(ExpertConfig, "Expert parallelism.")
    expert_weight: ExpertWeightConfig = section(ExpertWeightConfig, "Weight parallelism of the experts.")
    expert_zero1: ExpertZero1Config = section(ExpertZero1Config, "Sharding of the experts' optimizer state.")
    sequence_parallel: bool = key(
        None, "Activations are split over the sequence.", derived="parallel.tensor.mode is not mtp", forced=True
    )
    context: ContextConfig = section(ContextConfig, "Context parallelism.")
    sequence_2D: Sequence2DConfig = section(  # noqa: N815 (InternEvo's name)
        Sequence2DConfig, "Sequence parallelism over heads and context."
    )
    fsdp: FsdpConfig = section(FsdpConfig, "Fully sharded data parallelism.")

    @model_validator(mode="after")
    def _fill(self) -> ParallelConfig:
        self._derive(sequence_parallel=self.tensor.mode != "mtp")
        return self

    @property
    def tensor_ranks(self) -> int:
        """Ranks that divide heads: `tensor.size`, or with `sequence_2D` a part of them."""
        return self.sequence_2D.head_size if self.sequence_2D.enable else self.tensor.size

    @property
    def context_ranks(self) -> int:
        """Ranks to which the tokens of a sample are dealt, beside the tensor ranks."""
        return self.sequence_2D.context_size if self.sequence_2D.enable else self.context.size

    @property
    def context_window(self) -> int:
        """Context ranks of an inner ring; 1: no double ring."""
        return self.sequence_2D.window_size if self.sequence_2D.enable else self.context.window_size

    @property
    def uses_fsdp(self) -> bool:
        """Whether either spelling enables FSDP."""
        return self.fsdp.enable or self.zero1.fsdp
