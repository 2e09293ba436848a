"""Pipelines through the config: stages, schedules and options, and whole runs that equal one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from helpers.commands import metrics_of, write_config
from helpers.configs import small_config
from helpers.ranks import RankPool

from internlm.config.loader import load_config
from internlm.core.context.parallel_context import ParallelContext
from internlm.initialize.build import build_layout, build_trainer, check_buildable
from internlm.initialize.stages import build_layer_split, build_options, build_pipeline_schedule
from internlm.utils.errors import ConfigError

STEPS = 4


def sizes(changes: dict[str, Any]) -> list[int]:
    return [len(layers) for layers in build_layer_split(small_config({"parallel.pipeline.size": 4, **changes}))]


def test_the_split_of_the_layers() -> None:
    layers, split = "model.num_layers", "parallel.pipeline.layer_split"
    assert sizes({}) == [1, 1, 1, 1]
    assert sizes({layers: 10}) == [2, 2, 3, 3]
    assert sizes({layers: 10, split: [4, 3, 2, 1]}) == [4, 3, 2, 1]
    # A head that costs what several layers cost leaves the last stage with few of them.
    costly = {layers: 16, "model.vocab_size": 4096, split: "cost"}
    assert sizes(costly)[-1] < sizes(costly)[0]
    assert sizes({**costly, "model.vocab_size": 64}) == [4, 4, 4, 4]
    assert len(sizes({layers: 8, "parallel.pipeline.mode": "ZBV"})) == 8
    assert sizes({"parallel.pipeline.size": 1}) == [4]


@pytest.mark.parametrize(("mode", "name"), [("1f1b", "1F1B"), ("ZBH1", "ZB-H1"), ("dualpipev", "DualPipeV")])
def test_the_schedule_and_what_it_asks_of_linear_layers(mode: str, name: str) -> None:
    config = small_config({"parallel.pipeline.size": 2, "parallel.pipeline.mode": mode})
    assert build_pipeline_schedule(config)(8).name == name
    assert build_options(config).postpone_weight_gradients == (mode != "1f1b")


def test_a_list_that_does_not_fit_is_found_before_ranks_meet() -> None:
    with pytest.raises(ConfigError, match=r"parallel.pipeline.layer_split = \[1, 4\]"):
        check_buildable(small_config({"parallel.pipeline.size": 2, "parallel.pipeline.layer_split": [1, 4]}), 2)


# -- whole runs -----------------------------------------------------------------------------------------------------


def run(folder: Path, world: int, changes: dict[str, Any]) -> None:
    values = {"data.total_steps": STEPS, "data.micro_num": 4, "model.num_layers": 4, **changes}
    overrides = [f"{key}={value}" for key, value in values.items()]
    # Every rank reads a config of its own, so that none reads one that is being written.
    loaded = load_config(write_config(folder), overrides, world_size=world)
    context = ParallelContext.create(build_layout(loaded.config, world))
    build_trainer(loaded.config, context, folder).fit()
    context.close()


def run_rank(folder: Path, world: int, changes: dict[str, Any]) -> None:
    run(folder / str(dist.get_rank()), world, changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.num_chunks": 2},
        {"parallel.pipeline.mode": "ZBH1", "parallel.pipeline.layer_split": "[1, 3]"},
        {"parallel.pipeline.mode": "ZBV"},
        {"parallel.pipeline.mode": "DUALPIPEV", "parallel.pipeline.layer_split": "cost"},
    ],
    ids=["1F1B", "interleaved", "ZBH1", "ZBV", "DUALPIPEV"],
)
def test_a_run_in_a_pipeline_is_the_run_of_one_process(
    tmp_path: Path, ranks: Callable[[int], RankPool], changes: dict[str, Any]
) -> None:
    common = {"ckpt.enable_save_ckpt": False}
    run(tmp_path / "alone", 1, common)
    ranks(2).run(run_rank, tmp_path, 2, {**common, "parallel.pipeline.size": 2, **changes})
    expected, found = metrics_of(tmp_path / "alone"), metrics_of(tmp_path / "0")
    assert len(found) == STEPS
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["valid_tokens"] == theirs["valid_tokens"]
        # Clipping divides by the norm, which is summed in another order: see tests/core/test_engine_pipeline.py.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_one_process_goes_on_where_a_pipeline_stopped(tmp_path: Path, ranks: Callable[[int], RankPool]) -> None:
    """Tied embeddings, of which each end of the pipeline holds a copy, are one tensor in the checkpoint."""
    saved = tmp_path / "checkpoints"
    common = {"model.num_layers": 4, "model.tie_word_embeddings": True, "ckpt.auto_resume": False}
    pipeline = {
        "parallel.pipeline.size": 2,
        "model.num_chunks": 2,
        "ckpt.save_ckpt_folder": saved,
        "ckpt.checkpoint_every": 2,
    }
    ranks(2).run(run_rank, tmp_path, 2, {**common, **pipeline})
    resume = {"ckpt.enable_save_ckpt": False, "ckpt.load_ckpt_info": {"path": str(saved / "2"), "content": ["all"]}}
    run(tmp_path / "alone", 1, {**common, **resume})
    expected, found = metrics_of(tmp_path / "0"), metrics_of(tmp_path / "alone")
    assert [line["step"] for line in found] == [3, 4]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected[2:]], rel=1e-5)
