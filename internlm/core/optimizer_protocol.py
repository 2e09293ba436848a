"""The optimizer as engine, checkpoints and hooks see it; implemented in `internlm.solver.optimizer.hybrid_zero`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.shard_spec import Box

HyperParameters = Mapping[str, float]
"""Values of one step by name: "lr" and others that the optimizer's update rule defines."""

ShardedTensors = Iterator[tuple[str, nn.Parameter, list[tuple[Box, Tensor]]]]
"""(key, parameter, this rank's pieces of a global tensor shaped like the parameter, each with its box)."""


class OptimizerResult(Protocol):
    """Result of `Optimizer.step`: scalar fp32 tensors on the device."""

    @property
    def grad_norm(self) -> Tensor:
        """Global L2 norm before clipping, loss scale removed."""

    @property
    def skipped(self) -> Tensor:
        """1.0 when the update was skipped."""


class LossScaler(Protocol):
    """The state of the loss scale."""

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of `state_dict`."""


class Optimizer(Protocol):
    """An optimizer with sharded state.

    Attributes:
        context: this rank's position and process groups.
        chunks: the modules whose parameters it updates.
    """

    context: ParallelContext
    chunks: list[nn.Module]

    @property
    def scaler(self) -> LossScaler: ...

    @property
    def loss_scale(self) -> Tensor:
        """Scalar fp32 tensor by which the loss is multiplied before backward."""

    @property
    def hyper_parameters(self) -> HyperParameters:
        """The hyper-parameters of the last step."""

    @property
    def num_updates(self) -> int:
        """Number of updates so far, without skipped ones. Reading waits for the device."""

    @num_updates.setter
    def num_updates(self, value: int) -> None: ...

    def begin_step(self, num_backwards: int) -> None:
        """Discard all gradients; each chunk will run `num_backwards` backward passes."""

    def reduce_gradients(self) -> None:
        """Finish summing gradients over ranks; collective. `step` calls it unless the caller has."""

    def step(self, hyper_parameters: HyperParameters | float) -> OptimizerResult:
        """Reduce and clip gradients, and update the parameters; collective.

        Args:
            hyper_parameters: missing ones have the rule's defaults; a number is the learning rate.
        """

    def finish_gathering(self) -> None:
        """Wait until every parameter has its updated value."""

    def reset_masters(self, *, keep_loaded: bool = False) -> None:
        """Copy the parameters into their masters, after weights were loaded.

        Args:
            keep_loaded: skip the masters that `sharded_state` yields, because a checkpoint loads them too.
        """

    def sharded_state(self) -> ShardedTensors:
        """The state with keys `<kind>/<name>`. The pieces are views: writing into them changes the state."""

    def sharded_gradients(self) -> ShardedTensors:
        """The gradients of the last step with keys `<name>`, summed over ranks, loss scale removed. Read-only.

        Valid after `reduce_gradients` or `step` until the next `begin_step`.
        """
