"""The interface of parallel modes; its base class is the trivial mode.

In the trivial mode, every rank holds full weights and activations, and only the samples differ. The modes in
`internlm.core.parallel.modes` override what they split. `parallelize` makes one instance for each chunk of a model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.core.communication.collectives import all_reduce
from internlm.core.communication.exchange import gather, own_part
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.context.context_attention import ContextAttention
from internlm.core.parallel.context.gathered_attention import LatentGathering
from internlm.core.parallel.context.split_batch import ContextOptions, ContextSplit, SplitSample
from internlm.core.parallel.experts.expert_linear import ExpertLinear, ExpertWeightStore
from internlm.core.parallel.linear.float8_shapes import refuse_odd_shape
from internlm.core.parallel.linear.parallel_linear import (
    InputExchange,
    LinearGroup,
    LocalWeights,
    ParallelLinear,
    WeightStore,
)
from internlm.core.parallel.linear.weight_gathering import GatherPlan
from internlm.core.parallel.linear.weight_gradients import WeightGradients
from internlm.core.parallel.linear.weight_scales import WeightScales
from internlm.core.parallel.shard_spec import ShardSpec, shard_spec_of
from internlm.core.parallel.weight_splits import ParameterShard
from internlm.data.batch import MicroBatch
from internlm.model.modules.inner_attention import InnerAttention
from internlm.model.modules.latent_attention import LatentAttention
from internlm.model.moe.experts import Experts
from internlm.model.ops.cross_entropy import LossFunction, LossOutput
from internlm.model.ops.float8 import grouped_gemm
from internlm.model.ops.float8 import scaled_gemm as float8
from internlm.model.ops.float8.grouped_kernels import Float8GroupedKernels
from internlm.model.ops.float8.kernels import Float8Kernels
from internlm.model.ops.grouped_kernels import GroupedKernels
from internlm.model.ops.linear_kernels import LinearKernels
from internlm.model.roles import HeadShape, Role


@dataclass(frozen=True)
class ParallelOptions:
    """Options of the parallel modes. No option changes a result beyond rounding (to float8, where enabled).

    Attributes:
        split_embedding_hidden: split an untied embedding over its hidden dimension instead of its vocabulary.
        weight_gathering: isp: when weights are gathered.
        expert_gathering: isp: when those of experts are.
        reduce_dtype: isp: dtype in which weight gradients are communicated.
        postpone_weight_gradients: linear layers can compute weight gradients later, as zero-bubble schedules require.
        float8_layers: numbers of the layers whose linear layers run their GEMMs in float8.
        gather_float8: isp and FSDP: all-gather the weights of float8 GEMMs, but those of experts, as float8.
        compile_casts: compile the casts to float8 of parallel linear layers, and of experts.
        context: how context ranks share the attention of a sample.
        defer_weights: leave the parameters on the meta device; `apply_fsdp` materializes and shards layer by layer.
    """

    split_embedding_hidden: bool = True
    weight_gathering: GatherPlan = field(default_factory=GatherPlan)
    expert_gathering: GatherPlan = field(default_factory=GatherPlan)
    reduce_dtype: torch.dtype = torch.float32
    postpone_weight_gradients: bool = False
    float8_layers: range = range(0)
    gather_float8: bool = True
    compile_casts: bool = False
    defer_weights: bool = False
    context: ContextOptions = field(default_factory=ContextOptions)


class HeadOutput(NamedTuple):
    """The loss of this rank's tokens.

    Attributes:
        loss: of these tokens; its sum over the ranks of `ModelParallel.token_axes` is the loss of all tokens.
        labels, type_ids: of the same tokens, int64 `[B, S']`.
    """

    loss: LossOutput
    labels: Tensor
    type_ids: Tensor


class ModelParallel:
    """The trivial mode, and the base class of all modes.

    Attributes:
        context: this rank's position and process groups.
        options: see `ParallelOptions`.
        weight_gradients: holds weight gradients that are computed or delivered later.
        heads: heads of the model's attention; None if the model does not state them.
        has_tied_head: whether the output head is the embedding.
        weight_scales: float8 scales of weights that are gathered in float8.
        context_split: deals the tokens of samples to context ranks; None: a context rank has all.
        token_axes: axes of the activation view whose ranks compute the loss of different tokens.
        scale_axis: axis of the activation view over which the operands of a GEMM are split, so that a float8 scale is
            a maximum over its ranks.
    """

    token_axes: ClassVar[tuple[str, ...]] = ("data", "context")
    scale_axis: ClassVar[str] = "context"

    def __init__(
        self,
        context: ParallelContext,
        options: ParallelOptions,
        weight_gradients: WeightGradients,
        heads: HeadShape | None,
        has_tied_head: bool,
    ) -> None:
        self.context = context
        self.options = options
        self.weight_gradients = weight_gradients
        self.heads = heads
        self.has_tied_head = has_tied_head
        self.weight_scales = WeightScales()
        self.context_split: ContextSplit | None = None

    @property
    def residual_axis(self) -> str:
        """Axis of the activation view whose ranks hold different tokens of the residual stream of a sample."""
        return "context"

    @property
    def routing_axis(self) -> str:
        """Axis of the activation view whose ranks route different tokens of a sample."""
        return "sample" if self.context.layout.splits_tokens_of_routers else self.residual_axis

    # -- what each rank holds -------------------------------------------------------------------------------------

    def place(
        self, name: str, attribute: str, shape: tuple[int, ...], role: Role, heads: HeadShape | None
    ) -> list[ParameterShard]:
        """The local parameters that hold this rank's part of a global parameter.

        Args:
            name: global name.
            attribute: its last component, "weight" or "bias".
            shape: global shape.
            role: of the module.
            heads: all heads of its attention block; for attention roles.

        Raises:
            ConfigError: the parameter cannot be split as the layout requires.
        """
        return [ParameterShard(attribute, ShardSpec.whole(name, shape))]

    def local_heads(self, heads: HeadShape) -> HeadShape:
        """All heads of an attention block -> the heads in the outputs of its projections on this rank."""
        return heads

    def sum_over_heads(self, role: Role, heads: HeadShape) -> Callable[[Tensor], Tensor] | None:
        """Sums a number per token over all heads of a projection; see `ProjectionNorm`. None: ranks hold all heads.

        Args:
            role: PER_QUERY_CHANNEL or PER_KV_CHANNEL.
            heads: all heads of the block.
        """
        return None

    # -- linear layers and embedding ------------------------------------------------------------------------------

    @property
    def splits_tokens_of_linears(self) -> bool:
        """Whether attention projections return only this rank's tokens, which `inner_attention` must then exchange."""
        return False

    @property
    def replaces_linears(self) -> bool:
        """Whether linear layers are replaced by `ParallelLinear`."""
        # Others than `ParallelLinear` know no ranks, which context ranks need for the scales of float8.
        scales_span_ranks = bool(self.options.float8_layers) and self.context.size("context") > 1
        return self.options.postpone_weight_gradients or scales_span_ranks

    def make_group(self, name: str, layers: list[ParallelLinear]) -> LinearGroup:
        """Group layers that are computed together from one input.

        Args:
            name: module name of the first layer.
            layers: one or more, of equal kind.

        Raises:
            ConfigError: the group runs in float8, and the shape of a weight does not allow it.
        """
        role = layers[0].role
        kernels = LinearKernels()
        if self.is_float8(name):
            weights = [shard.weight for layer in layers for shard in layer.shards()]
            for weight in weights:
                refuse_odd_shape(name, shard_spec_of(weight))
            kernels = Float8Kernels(
                weights[0].dtype,
                on_hardware=float8.runs_on_hardware(self.context.device),
                reduce_amax=self._reduce_amax,
                compiles_casts=self.options.compile_casts,
            )
        return LinearGroup(name, layers, self.input_exchange(role), self.weights(), self.weight_gradients, kernels)

    def adapt_experts(self, name: str, experts: Experts) -> None:
        """Give the experts of a layer their linear layers, where these are in float8 or get weights from elsewhere.

        Args:
            name: of the module.
            experts: with this rank's parameters.

        Raises:
            ConfigError: the experts run in float8, and the shape of a weight does not allow it.
        """
        weights, is_float8 = self.expert_weights(), self.is_float8(name)
        if not is_float8 and isinstance(weights, LocalWeights):
            return
        for attribute, parameter in (("13", experts.w13), ("2", experts.w2)):
            kernels = GroupedKernels()
            if is_float8:
                refuse_odd_shape(f"{name}.w{attribute}", shard_spec_of(parameter))
                is_split = self.context.layout.expert_tensor > 1
                kernels = Float8GroupedKernels(
                    parameter.dtype,
                    grouped_gemm.implementation(self.context.device),
                    splits_rows=is_split and attribute == "2",
                    reduce_amax=self._reduce_amax if is_split else None,
                    compiles_casts=self.options.compile_casts,
                )
            linear = ExpertLinear(name, experts, f"w{attribute}", weights, self.weight_gradients, kernels)
            setattr(experts, f"linear{attribute}", linear)

    def expert_weights(self) -> ExpertWeightStore:
        """The source of the full weights of experts."""
        return LocalWeights()

    def _reduce_amax(self, amaxes: Tensor) -> Tensor:
        return all_reduce(amaxes, self.context.group(self.scale_axis), dist.ReduceOp.MAX)

    def is_float8(self, name: str) -> bool:
        """Whether a linear layer of this name runs its GEMMs in float8."""
        number = re.search(r"\.(\d+)\.", name)
        return number is not None and int(number[1]) in self.options.float8_layers

    def input_exchange(self, role: Role) -> InputExchange:
        """How linear layers of this role gather their input and reduce its gradient."""
        return InputExchange()

    def weights(self) -> WeightStore:
        """The source of the full weights of linear layers."""
        return LocalWeights()

    def finish_output(self, role: Role) -> Callable[[Tensor], Tensor] | None:
        """The reduction of the output of a linear layer of this role, applied before its bias; None if none."""
        return None

    def inner_attention(self, inner: InnerAttention, heads: HeadShape) -> nn.Module:
        """The module that replaces the `InnerAttention` of an attention block.

        Args:
            inner: runs on full sequences.
            heads: all heads of the block.
        """
        return inner if self.context.size("context") == 1 else ContextAttention(inner, self.context)

    def share_key(self) -> Callable[[Tensor], Tensor] | None:
        """The exchange of rotary keys of latent attention, which all heads have in common; None if there is none.

        It takes those of the tokens in this rank's residual stream, `[B, S', D]`, and returns those of the tokens for
        which column layers return outputs. In backward, it sums the gradients of the heads of all ranks.
        """
        return None

    def gather_latents(self, attention: LatentAttention) -> LatentGathering | None:
        """The gathering of latent vectors over context ranks; None if there is none.

        Args:
            attention: of this rank, with parallel linear layers.
        """
        return LatentGathering(self.context, attention.inner.window) if self.context.layout.gathers_latents else None

    def embed(self, weight: nn.Parameter, spec: ShardSpec, input_ids: Tensor) -> Tensor:
        """Token ids int64 `[B, S]` -> this rank's part of the residual stream, `[B, S', h]`.

        Args:
            weight: shape `spec.local_shape`.
            spec: as returned by `place`; between calls, FSDP shards the parameter further.
            input_ids: of all tokens.
        """
        return F.embedding(input_ids, weight)

    def split_sample(self, micro: MicroBatch) -> SplitSample:
        """This context rank's tokens of a micro-batch on the host, and the plans of their attention."""
        return SplitSample(micro) if self.context_split is None else self.context_split.split(micro)

    # -- pictures -------------------------------------------------------------------------------------------------

    def own_images(self, images: Tensor) -> Tensor:
        """The pictures of a sample, `[N, 3, H, W]` -> those that this rank encodes, `[N', 3, H, W]`.

        N' is equal on all ranks that share a sample, and at least 1: behind the last picture come blank ones.
        """
        num_ranks = self.context.size("sample")
        blank = images.new_zeros(max(-len(images) % num_ranks, num_ranks - len(images)), *images.shape[1:])
        padded = torch.cat([images, blank])
        return own_part(own_part(padded, self.context.group("context"), 0), self.context.group("tensor"), 0)

    def gather_features(self, features: Tensor) -> Tensor:
        """The features of this rank's pictures, `[N' P, h]` -> of all pictures of the sample, in order.

        In backward, each rank gets the whole gradient of its own features.
        """
        return gather(features, self.context.group("context"), dim=0)

    # -- for the engine -------------------------------------------------------------------------------------------

    def own_tokens(self, values: Tensor) -> Tensor:
        """Values of all tokens, `[B, S, ...]` -> those of the tokens in this rank's residual stream, `[B, S', ...]`."""
        return values

    def sequence_length(self, num_tokens: int) -> int:
        """The length S' of this rank's residual stream, for rows of `num_tokens` tokens."""
        return num_tokens

    def head_weight(self, model: nn.Module) -> Tensor:
        """The weight of the output head as `head_loss` uses it; one call serves several losses of a micro-batch.

        Args:
            model: the chunk that holds the head.
        """
        weight: Tensor = model.head_weight()  # type: ignore[operator]
        return weight

    def head_loss(
        self,
        model: nn.Module,
        hidden: Tensor,
        labels: Tensor,
        type_ids: Tensor,
        loss: LossFunction,
        weight: Tensor | None = None,
    ) -> HeadOutput:
        """Output head and loss of one micro-batch.

        Args:
            model: the chunk that holds the head.
            hidden: output of that chunk, `[B, S', h]`.
            labels, type_ids: int64 `[B, S]`, of all tokens of the micro-batch.
            loss: see `LossFunction`.
            weight: from `head_weight`; None: it is called.
        """
        weight = self.head_weight(model) if weight is None else weight
        output = loss(hidden.flatten(0, 1), weight, labels.flatten())
        return HeadOutput(output, labels, type_ids)

    def end_backward(self) -> None:
        """Deliver all outstanding weight gradients; called after the last backward pass of a step."""
        self.weight_gradients.finish()
        self.weight_scales.forget()


def parallel_of(model: nn.Module) -> ModelParallel:
    """The mode of `model`.

    Raises:
        ValueError: the model was not passed through `parallelize`.
    """
    parallel = getattr(model, "parallel", None)
    if parallel is None:
        raise ValueError("pass the model through internlm.core.parallel.parallelize first")
    assert isinstance(parallel, ModelParallel)
    return parallel
