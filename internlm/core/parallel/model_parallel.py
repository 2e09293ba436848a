"""How a model was parallelized: what the modes differ in. `parallelize` makes one for each chunk of a model.

This class is the trivial mode: weights and activations are whole on every rank, only samples differ. Each of
`internlm.core.parallel.modes` is one file that says otherwise where it must.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.core.communication.collectives import all_reduce
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.linear.float8_shapes import refuse_odd_shape
from internlm.core.parallel.linear.parallel_linear import (
    InputExchange,
    LinearGroup,
    LocalWeights,
    ParallelLinear,
    WeightStore,
)
from internlm.core.parallel.linear.weight_gradients import WeightGradients
from internlm.core.parallel.linear.weight_scales import WeightScales
from internlm.core.parallel.shard_spec import ShardSpec, shard_spec_of
from internlm.core.parallel.weight_splits import ParameterShard
from internlm.model.modules.inner_attention import InnerAttention
from internlm.model.ops.cross_entropy import LossFunction, LossOutput
from internlm.model.ops.float8 import scaled_gemm as float8
from internlm.model.ops.float8.kernels import Float8Kernels
from internlm.model.ops.linear_kernels import LinearKernels
from internlm.model.roles import HeadShape, Role


@dataclass(frozen=True)
class ParallelOptions:
    """How the layout's modes go about their work. No option changes a result beyond rounding (to float8, if asked for).

    Attributes:
        split_embedding_hidden: split an untied embedding over its hidden dimension instead of its vocabulary.
        weight_overlap: isp: gather weights ahead of their use, and reduce their gradients behind it.
        gather_ahead: isp: gather the next module's weights, or those of the next layer.
        gather_layer_before: isp, by layer: the point of a layer where the gather of the next one starts.
        release_gradients_early: isp: free a reduced gradient's buffers when the next one is there, not with the step.
        memory_pool: isp: keep gather buffers and use them again.
        reduce_dtype: isp: dtype in which weight gradients are communicated.
        postpone_weight_gradients: linear layers can leave weight gradients for later, as zero-bubble schedules ask.
        float8_layers: numbers of the model's layers whose linear layers multiply in float8.
        gather_float8: isp and FSDP: gather weights that are multiplied in float8 as float8.
        compile_casts: to float8, in layers that exchange or that postpone weight gradients.
        defer_weights: leave the parameters on the meta device: `apply_fsdp` materializes and splits layer by layer.
    """

    split_embedding_hidden: bool = True
    weight_overlap: bool = False
    gather_ahead: Literal["layer", "module"] = "layer"
    gather_layer_before: Literal["wqkv", "attn", "wo", "w1"] = "wo"
    release_gradients_early: bool = True
    memory_pool: bool = False
    reduce_dtype: torch.dtype = torch.float32
    postpone_weight_gradients: bool = False
    float8_layers: range = range(0)
    gather_float8: bool = True
    compile_casts: bool = False
    defer_weights: bool = False


class HeadOutput(NamedTuple):
    """The loss of this rank's tokens.

    Attributes:
        loss: of them; sum over the ranks of `ModelParallel.token_axes` for the loss of all.
        labels, type_ids: of the same tokens, `[B, S']`.
    """

    loss: LossOutput
    labels: Tensor
    type_ids: Tensor


class ModelParallel:
    """The trivial mode, and what every mode must say.

    Attributes:
        context: where this rank stands.
        options: see `ParallelOptions`.
        weight_gradients: where linear layers leave gradients that come later.
        heads: of the model's attention, or None.
        has_tied_head: the output head is the embedding.
        weight_scales: of weights that are gathered in float8.
        token_axes: axes of the activation view whose ranks compute the loss of different tokens.
        scale_axis: axis of the activation view over which inputs or weights of linear layers are split when they are
            multiplied, if any.
    """

    token_axes: ClassVar[tuple[str, ...]] = ("data",)
    scale_axis: ClassVar[str | None] = None

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

    # -- what each rank holds -------------------------------------------------------------------------------------

    def place(
        self, name: str, attribute: str, shape: tuple[int, ...], role: Role, heads: HeadShape | None
    ) -> list[ParameterShard]:
        """The local parameters that hold this rank's part of a global one.

        Args:
            name: global name.
            attribute: its last part, "weight" or "bias".
            shape: of the whole.
            role: of the module.
            heads: all heads of its attention block; for attention roles.

        Raises:
            ConfigError: it cannot be split as the layout asks.
        """
        return [ParameterShard(attribute, ShardSpec.whole(name, shape))]

    def local_heads(self, heads: HeadShape) -> HeadShape:
        """Heads of an attention block -> those that the outputs of its projections have on this rank."""
        return heads

    # -- linear layers and embedding ------------------------------------------------------------------------------

    @property
    def splits_tokens_of_linears(self) -> bool:
        """Whether linear layers of attention give a part of the tokens, so that an `InnerAttention` must join them."""
        return False

    @property
    def replaces_linears(self) -> bool:
        """Whether linear layers must be `ParallelLinear`."""
        return self.options.postpone_weight_gradients

    def make_group(self, name: str, layers: list[ParallelLinear]) -> LinearGroup:
        """Join layers that are computed together from one input."""
        role = layers[0].role
        kernels = LinearKernels()
        if self.is_float8(name):
            weights = [shard.weight for layer in layers for shard in layer.shards()]
            for weight in weights:
                refuse_odd_shape(name, shard_spec_of(weight))
            kernels = Float8Kernels(
                weights[0].dtype,
                on_hardware=float8.runs_on_hardware(self.context.device),
                reduce_amax=self._largest_over_ranks,
                compiles_casts=self.options.compile_casts,
            )
        return LinearGroup(name, layers, self.input_exchange(role), self.weights(), self.weight_gradients, kernels)

    def _largest_over_ranks(self, amaxes: Tensor) -> Tensor:
        axis = self.scale_axis
        return all_reduce(amaxes, None if axis is None else self.context.group(axis), dist.ReduceOp.MAX)

    def is_float8(self, name: str) -> bool:
        """Whether a linear layer of this name runs its GEMMs in float8."""
        number = re.search(r"\.(\d+)\.", name)
        return number is not None and int(number[1]) in self.options.float8_layers

    def input_exchange(self, role: Role) -> InputExchange:
        """How layers of this role get their input."""
        return InputExchange()

    def weights(self) -> WeightStore:
        """Where linear layers get their weights."""
        return LocalWeights()

    def finish_output(self, role: Role) -> Callable[[Tensor], Tensor] | None:
        """What completes the output of a linear layer of this role before its bias is added; None: nothing."""
        return None

    def inner_attention(self, inner: InnerAttention, heads: HeadShape) -> nn.Module:
        """The module that takes the place of an attention block's `InnerAttention`.

        Args:
            inner: runs on full sequences.
            heads: all heads of the block.
        """
        return inner

    def embed(self, weight: nn.Parameter, spec: ShardSpec, input_ids: Tensor) -> Tensor:
        """Token ids int64 `[B, S]` -> this rank's part of the residual stream, `[B, S', h]`.

        Args:
            weight: of the local shape that `spec` says.
            spec: as the mode placed it; FSDP splits the parameter further between its calls.
            input_ids: of all tokens.
        """
        return F.embedding(input_ids, weight)

    # -- what the engine asks -------------------------------------------------------------------------------------

    def own_tokens(self, values: Tensor) -> Tensor:
        """Values of all tokens, `[B, S, ...]` -> those of the tokens in this rank's residual stream, `[B, S', ...]`."""
        return values

    def sequence_length(self, num_tokens: int) -> int:
        """Tokens of a row of `num_tokens` that this rank's residual stream holds."""
        return num_tokens

    def head_loss(
        self, model: nn.Module, hidden: Tensor, labels: Tensor, type_ids: Tensor, loss: LossFunction
    ) -> HeadOutput:
        """Head and loss of one micro batch.

        Args:
            model: the chunk that holds the head.
            hidden: `[B, S', h]`, its output.
            labels, type_ids: int64 `[B, S]` of all tokens of the micro batch.
            loss: see `LossFunction`.
        """
        output = loss(hidden.flatten(0, 1), model.head_weight(), labels.flatten())  # type: ignore[operator]
        return HeadOutput(output, labels, type_ids)

    def end_backward(self) -> None:
        """Called after the last backward pass of a step: all weight gradients are delivered."""
        self.weight_gradients.finish()
        self.weight_scales.forget()


def parallel_of(model: nn.Module) -> ModelParallel:
    """How `model` was parallelized.

    Raises:
        ValueError: it was not.
    """
    parallel = getattr(model, "parallel", None)
    if parallel is None:
        raise ValueError("pass the model through internlm.core.parallel.parallelize first")
    assert isinstance(parallel, ModelParallel)
    return parallel
