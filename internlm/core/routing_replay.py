"""Writes the experts that routers choose in training, or lets routers take them from files.

The files (`core/routing_files.py`) are the same for every layout. Only the choice is replayed: weights of experts and
losses follow from the scores of the reading run. Passes without gradients are neither written nor replayed.
"""

from __future__ import annotations

import math
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
        self._positions: dict[int, Tensor] = {}
        """Micro-batch -> positions of this rank's tokens; see `Replay.begin_micro_batch`."""
        self._chosen: dict[tuple[int, int], Tensor] = {}
        """(layer, micro-batch) -> experts of this rank's tokens, int64 `[t, k]`."""
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

    def begin_micro_batch(self, number: int, shape: tuple[int, int], positions: Tensor) -> None:
        self._shape, self._positions[number] = shape, positions
        if self._read is not None:
            for router in self._routers:
                if (router.layer, number) not in self._chosen:
                    self._chosen[router.layer, number] = self._load(router, self._read, number)

    def _take(self, layer: int, experts: Tensor) -> Tensor:
        """The experts of the tokens that a router has chosen `experts` for, int64 `[t, k]`."""
        key = layer, self._routing.micro_batch
        if self._read is None:
            self._chosen[key] = experts
            return experts
        chosen = self._chosen[key]
        # Padding behind the sample is in no file.
        return torch.cat((chosen, experts[len(chosen) :])) if len(chosen) < len(experts) else chosen

    def on_step_end(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        if self._write is not None:
            for router in self._routers:
                self._save(router, self._write)

    def _file_shape(self, router: Router) -> tuple[int, int, int]:
        rows = self._routing.num_micro_batches * self._shape[0] * self._context.size("data")
        return rows, self._shape[1], router.form.top_k

    def _rows(self, number: int) -> slice:
        """The rows of the global batch that a micro-batch of this data rank has."""
        first = self._context.index("data") * self._routing.num_micro_batches + number
        return slice(first * self._shape[0], (first + 1) * self._shape[0])

    def _own_positions(self, number: int) -> Tensor:
        """Positions of this rank's tokens of a micro-batch, without those of padding behind it, which are last."""
        positions = self._positions[number]
        return positions[positions < math.prod(self._shape)]

    def _load(self, router: Router, folder: Path, number: int) -> Tensor:
        path = path_of_routing(folder, self._step, router.layer)
        tokens = self._own_positions(number).numpy()
        part = load_routing(path, self._file_shape(router), router.form.num_experts, self._rows(number), tokens)
        return torch.from_numpy(part).to(self._context.device)

    def _save(self, router: Router, folder: Path) -> None:
        """Collective over the ranks that have tokens of the layer; the first of them writes."""
        device = self._context.device
        whole = torch.zeros(self._file_shape(router), dtype=torch.int64, device=device)
        for number in range(self._routing.num_micro_batches):
            positions = self._own_positions(number).to(device)
            experts = self._chosen[router.layer, number]
            whole[self._rows(number)].flatten(0, 1)[positions] = experts[: len(positions)]
        for axis in ("data", self._axis):
            all_reduce(whole, self._context.group(axis))
        if self._context.index("data") == self._context.index("sample") == 0:
            save_routing(path_of_routing(folder, self._step, router.layer), whole.cpu().numpy())
