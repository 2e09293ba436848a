"""Writes the experts that routers choose in training, or lets routers take them from files.

The files (`core/routing_files.py`) are the same for every layout. Only the choice is replayed: weights of experts and
losses follow from the scores of the reading run. Passes without gradients are neither written nor replayed.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from internlm.core.communication.collectives import all_reduce
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.hooks import Hook, RunningTrainer
from internlm.core.routing_files import check_layers, load_routing, path_of_routing, path_of_step, save_routing
from internlm.core.step_metrics import StepMetrics
from internlm.model.moe.router import Router, routers_of
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


class RoutingReplay(Hook):
    """The routers of this rank, whose choices are written or read. Installs itself in routers and engine.

    Args:
        engine: of the run.
        write: folder to write to; None: nothing is written.
        read: folder to read from; None: routers choose.
    """

    name = "routing_replay"

    def __init__(self, engine: Engine, *, write: Path | None = None, read: Path | None = None) -> None:
        self._context: ParallelContext = engine.context
        self._routing = engine.routing
        self._axis = engine.parallel.routing_axis
        self._routers = routers_of(engine.chunks)
        self._write, self._read = write, read
        self._step = 0
        self._shape = (0, 0)
        self._chosen: dict[tuple[int, int], Tensor] = {}
        """(layer, micro-batch) -> experts of this rank's tokens, int64 `[T, k]`."""
        self._routing.replay = self
        for router in self._routers:
            router.replay = partial(self._take, router.layer)

    def on_fit_start(self, trainer: RunningTrainer) -> None:
        if self._write is None or not trainer.is_main_rank:
            return
        first = trainer.state.step + 1
        if path_of_step(self._write, first).exists():
            logger.warning("moe.replay.write: step %d and later ones in %s are overwritten", first, self._write)

    def on_step_start(self, trainer: RunningTrainer) -> None:
        self._step = trainer.state.step + 1
        self._chosen.clear()
        if self._read is not None:
            check_layers(self._read, self._step, self._routing.layers_with_experts)

    def begin_micro_batch(self, number: int, shape: tuple[int, int]) -> None:
        """Called before the forward pass of a micro-batch of this data rank, `[B, S]`."""
        self._shape = shape
        if self._read is not None and not self._chosen:
            for router in self._routers:
                self._load(router, self._read)

    def _take(self, layer: int, experts: Tensor) -> Tensor:
        """The experts of the tokens that a router has chosen `experts` for, int64 `[T, k]`."""
        key = layer, self._routing.micro_batch
        if self._read is not None:
            return self._chosen[key]
        self._chosen[key] = experts
        return experts

    def on_step_end(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        if self._write is not None:
            for router in self._routers:
                self._save(router, self._write)

    def _rows(self) -> tuple[int, slice]:
        """Rows of the global batch, and which of them this data rank has."""
        rows = self._routing.num_micro_batches * self._shape[0]
        index = self._context.index("data")
        return rows * self._context.size("data"), slice(index * rows, (index + 1) * rows)

    def _positions(self, router: Router) -> slice:
        """Positions of a row that this rank routes."""
        size = self._shape[1] // router.num_sharing
        index = self._context.index(self._axis)
        return slice(index * size, (index + 1) * size)

    def _load(self, router: Router, folder: Path) -> None:
        num_rows, rows = self._rows()
        path = path_of_routing(folder, self._step, router.layer)
        shape = num_rows, self._shape[1], router.form.top_k
        part = load_routing(path, shape, router.form.num_experts, rows, self._positions(router))
        by_micro_batch = torch.from_numpy(part).to(self._context.device).chunk(self._routing.num_micro_batches)
        for number, experts in enumerate(by_micro_batch):
            self._chosen[router.layer, number] = experts.flatten(0, 1)

    def _save(self, router: Router, folder: Path) -> None:
        """Collective over the ranks that have tokens of the layer; the first of them writes."""
        num_rows, rows = self._rows()
        positions = self._positions(router)
        parts = [self._chosen[router.layer, number] for number in range(self._routing.num_micro_batches)]
        own = torch.stack(parts).view(rows.stop - rows.start, positions.stop - positions.start, -1)
        whole = own.new_zeros(num_rows, self._shape[1], own.shape[-1])
        whole[rows, positions] = own
        for axis in ("data", self._axis):
            all_reduce(whole, self._context.group(axis))
        if self._context.index("data") == self._context.index("sample") == 0:
            save_routing(path_of_routing(folder, self._step, router.layer), whole.cpu().numpy())
