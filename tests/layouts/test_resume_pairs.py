"""Whole runs on tokenized data that begin in one layout and go on in another, against one process without a break.

A global batch is the same samples in the same order, whatever the number of ranks; learning rate and beta2 go on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import write_config
from helpers.resume import Ranks

from internlm.config.loader import load_config
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.hooks import Hook, TrainState
from internlm.core.step_metrics import StepMetrics
from internlm.core.trainer import Trainer
from internlm.data.batch import Batch
from internlm.data.tokenized_files.writer import TokenizedWriter
from internlm.initialize.build import build_layout, build_trainer
from internlm.verify.case import ADAM_EPSILON, LEARNING_RATE, ROUTER_LOSSES, Case
from internlm.verify.choices import LayoutChoices, from_text
from internlm.verify.compare import compare, tolerance_of
from internlm.verify.record import Array, RankRecord, Record, join_ranks
from internlm.verify.run import Recorder

SAVED_STEP, LAST_STEP, MICRO_BATCHES = 2, 4, 8

LAYOUTS = (
    "ranks=1",
    "ranks=4 tensor=2,mode=mtp",
    "ranks=4 tensor=4,mode=msp",
    "ranks=4 tensor=2,mode=isp,weight=4,overlap",
    "ranks=2 mode=isp,weight=2",
    "ranks=8 zero=4",
    "ranks=2 fsdp",
    "ranks=4 fsdp,zero=2",
    "ranks=4 tensor=2,mode=fsp,pipeline=2,schedule=ZBH1",
    "ranks=2 pipeline=2,chunks=2",
    "ranks=4 pipeline=2,schedule=ZBV,zero=1",
    "ranks=4 tensor=2,mode=isp,weight=2,pipeline=2,schedule=DUALPIPEV",
    "ranks=4 pipeline=4",
)
"""Each loads what the one before it saved: other modes and sizes, weight parallelism, ZeRO, FSDP, pipelines, ranks."""

EXPERT_LAYOUTS = (
    "ranks=1",
    "ranks=4 expert=4",
    "ranks=4 tensor=2,mode=msp,expert=2,expert_tensor",
    "ranks=2 fsdp",
    "ranks=8 tensor=2,mode=mtp,expert=8,zero=1",
    "ranks=4 tensor=2,mode=isp,weight=4,overlap,expert=1,expert_weight=4,expert_overlap",
    "ranks=4 tensor=2,mode=isp,weight=2,pipeline=2,schedule=DUALPIPEV,expert=2",
    "ranks=4 tensor=2,mode=msp,fsdp,expert_tensor",
    "ranks=8 pipeline=2,chunks=2,expert=2,expert_zero=1",
    "ranks=8 tensor=2,mode=fsp,pipeline=2,schedule=ZBV,expert=4",
    "ranks=8 mode=isp,expert=2,expert_weight=2,zero=2,expert_zero=2",
)
"""The same of a mixture of experts: also other numbers of experts on a rank."""

EXPERT_KEYS: dict[str, Any] = {
    "model_type": "QWEN2MOE",
    "model.num_experts": 8,
    "model.top_k": 2,
    "model.num_shared_experts": 1,
    "model.moe_type": "Dropless",
    # Rounding in fp32 may change the expert of a token.
    "model.dtype": "torch.float64",
    **ROUTER_LOSSES,
}


@dataclass(frozen=True)
class RankPart:
    """A part of a run, as one rank saw it.

    Attributes:
        record: of its steps.
        state: the counters at its end.
        data_rank: this rank's place in a global batch.
        batches: of each step, the global indices of the samples and their tokens.
        rates: of each step, learning rate and beta2.
    """

    record: RankRecord
    state: TrainState
    data_rank: int
    batches: list[tuple[list[int], list[Array]]]
    rates: list[tuple[float, float]]


class Rates(Hook):
    """Keeps learning rate and beta2 of every step."""

    name = "rates"

    def __init__(self) -> None:
        self.rates: list[tuple[float, float]] = []

    def on_step_end(self, trainer: Any, metrics: StepMetrics) -> None:
        self.rates.append((metrics.hyper_parameters["lr"], metrics.hyper_parameters["beta2"]))


def case_of(folder: str, layout: str) -> Case:
    """The config of a run in a layout, and its ranks."""
    ranks, _, choices = layout.partition(" ")
    world_size, parts = int(ranks.removeprefix("ranks=")), from_text(LayoutChoices, choices)
    keys: dict[str, Any] = {
        "data.train_folder": f"{folder}/data",
        "data.total_steps": LAST_STEP,
        "lr_scheduler.total_steps": LAST_STEP,
        "lr_scheduler.warmup_ratio": 0.3,
        "beta2_scheduler.c": 0.8,
        "adam.lr": LEARNING_RATE,
        "adam.adam_eps": ADAM_EPSILON,
        "model.num_layers": 4,
        "ckpt.checkpoint_every": SAVED_STEP,
        "data.micro_num": MICRO_BATCHES * parts.tensor * parts.pipeline // world_size,
        **parts.keys(),
        **(EXPERT_KEYS if "experts" in Path(folder).name else {}),
    }
    loaded = load_config(Path(folder) / "config.py", world_size=world_size, options={layout: keys})
    return Case(loaded.config, world_size)


def part_of_run(folder: str, layout: str, save_folder: str | None, until: int) -> RankPart:
    """Train in a layout until a step, on each rank: from the newest checkpoint of `save_folder`, where there is one."""
    case = case_of(folder, layout)
    config = case.config
    ckpt = config.ckpt.model_copy(update={"save_ckpt_folder": save_folder, "enable_save_ckpt": save_folder is not None})
    context = ParallelContext.create(build_layout(config, case.world_size))
    run_dir = Path(folder) / "runs" / layout / str(until)
    trainer = build_trainer(config.model_copy(update={"ckpt": ckpt}), context, run_dir)
    recorder, rates = Recorder(trainer), Rates()
    # The last steps are compared, not saved.
    trainer.hooks = [hook for hook in trainer.hooks if until < LAST_STEP or hook.name != "checkpoint"] + [rates]
    trainer.total_steps = until
    batches = watch_batches(trainer)
    state = trainer.fit()
    context.close()
    return RankPart(recorder.record, state, context.index("data"), batches, rates.rates)


def watch_batches(trainer: Trainer) -> list[tuple[list[int], list[Array]]]:
    """A list that grows by each batch that the trainer's engine is given."""
    seen: list[tuple[list[int], list[Array]]] = []
    real = trainer.engine.train_step

    def train_step(batch: Batch, *args: Any) -> Any:
        seen.append((list(batch.sample_indices), [micro.input_ids.numpy().copy() for micro in batch.micro_batches]))
        return real(batch, *args)

    trainer.engine.train_step = train_step  # type: ignore[method-assign]
    return seen


def global_batches(parts: list[RankPart]) -> list[tuple[list[int], list[list[int]]]]:
    """Of each step, sample indices and tokens in the order of the data ranks; ranks of one place have the same."""
    by_place: dict[int, list[tuple[list[int], list[list[int]]]]] = {}
    for part in parts:
        batches = [(indices, [tokens.tolist() for tokens in micros]) for indices, micros in part.batches]
        assert by_place.setdefault(part.data_rank, batches) == batches
    steps = zip(*(by_place[place] for place in sorted(by_place)), strict=True)
    return [
        (list(itertools.chain(*(one for one, _ in step))), list(itertools.chain(*(other for _, other in step))))
        for step in steps
    ]


class Runs:
    """The runs of this module, each once."""

    def __init__(self, folder: Path, ranks: Ranks, layouts: Sequence[str]) -> None:
        self.folder = str(folder)
        self._layouts = layouts
        self._ranks = ranks
        self._first: dict[str, list[RankPart]] = {}
        self._whole: list[RankPart] = []

    def whole(self) -> list[RankPart]:
        """One process without a break."""
        self._whole = self._whole or self._run(self._layouts[0], None, LAST_STEP)
        return self._whole

    def first(self, layout: str) -> list[RankPart]:
        """The steps up to the save, in a layout."""
        if layout not in self._first:
            self._first[layout] = self._run(layout, layout, SAVED_STEP)
        return self._first[layout]

    def second(self, layout: str, before: str) -> list[RankPart]:
        """The steps after the save of another layout."""
        self.first(before)
        return self._run(layout, before, LAST_STEP)

    def _run(self, layout: str, saved_by: str | None, until: int) -> list[RankPart]:
        save_folder = None if saved_by is None else f"{self.folder}/saved/{self._layouts.index(saved_by)}"
        pool = self._ranks(case_of(self.folder, layout).world_size)
        return pool.run(part_of_run, self.folder, layout, save_folder, until)


def pairs(layouts: Sequence[str]) -> list[tuple[str, str]]:
    """Each layout behind the one before it."""
    return list(zip((layouts[-1], *layouts), layouts, strict=False))


def runs_in(folder: Path, ranks: Ranks, layouts: Sequence[str]) -> Runs:
    """Runs on data of their own; mixtures of experts where the folder is named after them."""
    write_config(folder)
    random = np.random.default_rng(0)
    # 14 samples: an epoch ends in the middle of step 2, the next one in that of step 4.
    with TokenizedWriter(folder / "data" / "en" / "train.bin") as writer:
        for _ in range(49):
            writer.write(random.integers(1, 61, random.integers(1, 16)).tolist())
    return Runs(folder, ranks, layouts)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Runs:
    return runs_in(tmp_path_factory.mktemp("pairs"), ranks, LAYOUTS)


@pytest.fixture(scope="module")
def expert_runs(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Runs:
    return runs_in(tmp_path_factory.mktemp("experts"), ranks, EXPERT_LAYOUTS)


@pytest.mark.parametrize(("before", "after"), pairs(LAYOUTS))
def test_a_run_goes_on_in_another_layout(before: str, after: str, runs: Runs) -> None:
    check_pair(before, after, runs)


@pytest.mark.parametrize(("before", "after"), pairs(EXPERT_LAYOUTS))
def test_a_mixture_goes_on_in_another_layout(before: str, after: str, expert_runs: Runs) -> None:
    check_pair(before, after, expert_runs)


def check_pair(before: str, after: str, runs: Runs) -> None:
    """Both parts of a run together are the whole run in one process."""
    whole, first, second = runs.whole(), runs.first(before), runs.second(after, before)

    assert global_batches(first) + global_batches(second) == global_batches(whole)
    assert {repr(part.state) for part in second} == {repr(whole[0].state)}
    assert {repr(a.rates + b.rates) for a in first for b in second} == {repr(whole[0].rates)}

    expected, start, end = (join_ranks([part.record for part in parts]) for parts in (whole, first, second))
    for name, weight in start.steps[-1].weights.items():
        assert np.array_equal(end.initial[name], weight), name
    record = Record(start.initial, start.steps + end.steps, end.placements)
    found = compare(record, expected, tolerance_of(case_of(runs.folder, after)))
    assert not found, "\n".join(map(str, found[:4]))
