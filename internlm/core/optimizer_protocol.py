"""What the engine, checkpoints and hooks need of an optimizer; `internlm.solver.optimizer.hybrid_zero` fulfils it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.shard_spec import Box

HyperParameters = Mapping[str, float]
"""Values of one step by name: "lr" and others that the optimizer's update rule knows."""

ShardedTensors = Iterator[tuple[str, nn.Parameter, list[tuple[Box, Tensor]]]]
"""(key, parameter, this rank's pieces of a global tensor shaped like the parameter, each with its box)."""


class OptimizerResult(Protocol):
    """The outcome of one optimizer step: scalar fp32 tensors."""

    @property
    def grad_norm(self) -> Tensor:
        """Global norm before clipping, loss scale removed."""

    @property
    def skipped(self) -> Tensor:
        """1.0 when the update was skipped."""


class LossScaler(Protocol):
    """The state of the loss scale."""

    def state_dict(self) -> dict[str, Any]:
        """As JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class Optimizer(Protocol):
    """An optimizer with sharded state.

    Attributes:
        context: where this rank stands.
        chunks: the modules whose parameters it updates.
    """

    context: ParallelContext
    chunks: list[nn.Module]

    @property
    def scaler(self) -> LossScaler: ...

    @property
    def loss_scale(self) -> Tensor:
        """Scalar fp32 by which the loss is multiplied before backward."""

    @property
    def hyper_parameters(self) -> HyperParameters:
        """Those of the last step."""

    @property
    def num_updates(self) -> int:
        """Updates taken so far, without skipped ones; waits for the device. May be set."""

    @num_updates.setter
    def num_updates(self, value: int) -> None: ...

    def begin_step(self, num_backwards: int) -> None:
        """Start with no gradients; each chunk will run this many backward passes."""

    def reduce_gradients(self) -> None:
        """Finish summing gradients over ranks; collective. `step` calls it where nobody has."""

    def step(self, hyper_parameters: HyperParameters | float) -> OptimizerResult:
        """Reduce, clip, update. Hyper-parameters left out keep their last values; a number is the learning rate."""

    def finish_gathering(self) -> None:
        """Wait until all parameters may be read."""

    def reset_masters(self, *, keep_loaded: bool = False) -> None:
        """Copy the parameters into their masters, after weights were loaded.

        `keep_loaded` skips masters that `sharded_state` yields, as they were loaded too.
        """

    def sharded_state(self) -> ShardedTensors:
        """The optimizer's state with keys `<kind>/<name>`; writing into the pieces changes it."""

    def sharded_gradients(self) -> ShardedTensors:
        """The gradients of the last step with keys `<name>`, summed over ranks, loss scale removed; to be read only."""
