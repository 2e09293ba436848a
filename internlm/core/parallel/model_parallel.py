"""How a model was parallelized: what the engine and the pipeline must know to run it. `parallelize` makes one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.weight_gradients import WeightGradients
from internlm.model.ops.cross_entropy import LossFunction, LossOutput


class HeadOutput(NamedTuple):
    """The loss of this rank's tokens.

    Attributes:
        loss: of them; sum over the ranks of `ModelParallel.token_axes` for the loss of all.
        labels, type_ids: of the same tokens, `[B, S']`.
    """

    loss: LossOutput
    labels: Tensor
    type_ids: Tensor


@dataclass
class ModelParallel:
    """The trivial form: activations and weights are whole on every rank, only samples differ.

    Attributes:
        context: where this rank stands.
        weight_gradients: where linear layers leave gradients that come later.
        token_axes: axes of the activation view whose ranks compute the loss of different tokens.
    """

    context: ParallelContext
    weight_gradients: WeightGradients = field(default_factory=WeightGradients)
    token_axes: tuple[str, ...] = ("data",)

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
