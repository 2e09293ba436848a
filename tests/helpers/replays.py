"""A stand-in for CUDA graphs on a CPU: a backend of torch.compile whose results live as long as those of a replay.

What a compiled function gives lies in memory that its place in a pass owns. When the next pass begins, all of it is
overwritten, here with NaN, so that whatever is read afterwards is seen, and given out again. Inputs are copied, but for
parameters, which are read where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd


class Replays:
    """`backend` is the backend for torch.compile; call `watch` before the first pass.

    Attributes:
        num_passes: how often a pass was said to begin.
        calls: compiled functions called in each pass, one number a pass.
        modes: what torch.compile was asked for, one a compiled graph.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", self._begin_pass)
        self.num_passes = 0
        self.calls: list[int] = []
        self.modes: list[str | None] = []
        self._memory: dict[tuple[Any, ...], Tensor] = {}
        self._in_place: set[int] = set()

    def watch(self, model: nn.Module) -> None:
        """Take the model's parameters for what stays in place. Call it when they lie where they will stay."""
        self._in_place = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def backend(self, graph: Any, inputs: Sequence[Any], mode: str | None = None) -> Callable[..., Any]:
        """As torch.compile calls it."""
        self.modes.append(mode)
        return aot_autograd(fw_compiler=self._compile, bw_compiler=self._compile)(graph, inputs)

    def _begin_pass(self) -> None:
        self.num_passes += 1
        self.calls.append(0)
        for memory in self._memory.values():
            memory.fill_(float("nan") if memory.is_floating_point() else -1)

    def _compile(self, graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> list[Any]:
            assert self.calls, "no pass has begun"
            # Copied like the inputs of a graph, so that no result is a view of one.
            own = [arg.clone() if self._is_moved(arg) else arg for arg in args]
            results = graph(*own)
            self.calls[-1] += 1
            return [self._place(result, number) for number, result in enumerate(results)]

        return make_boxed_func(run)

    def _is_moved(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self._in_place

    def _place(self, result: Any, number: int) -> Any:
        if not self._is_moved(result):
            return result
        key = (self.calls[-1], number, result.dtype, tuple(result.shape), result.stride())
        if key not in self._memory:
            self._memory[key] = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype)
        self._memory[key].copy_(result)
        # Another tensor with the same memory, whose changes autograd does not see: as with a replay.
        return self._memory[key].data
