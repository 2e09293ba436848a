"""What the config's keys make of the layers of a rank, through `build_trainer`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import metrics_of, write_config
from helpers.configs import small_config
from helpers.ranks import RankPool

from internlm.config.loader import load_config
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.trainer import Trainer
from internlm.initialize.build import build_layout, build_trainer, check_buildable
from internlm.model.decoder import Decoder
from internlm.utils.errors import ConfigError

LAYERS = 4


def new(folder: Path, **changes: Any) -> Trainer:
    """A trainer of the tiny config; `changes` are keys with `__` for a dot."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    values = {"data__total_steps": 2, "ckpt__enable_save_ckpt": False, "model__num_layers": LAYERS, **changes}
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in values.items()]
    loaded = load_config(write_config(folder), overrides, world_size=world)
    context = ParallelContext.create(build_layout(loaded.config, world))
    return build_trainer(loaded.config, context, folder)


def saved_by(trainer: Trainer) -> tuple[str, ...]:
    return tuple(layer.save_policy for layer in decoder_of(trainer).layers.values())


def decoder_of(trainer: Trainer) -> Decoder:
    (chunk,) = trainer.engine.chunks
    assert isinstance(chunk, Decoder)
    return chunk


@pytest.mark.parametrize(
    ("changes", "saved"),
    [
        ({}, ("everything",) * 4),
        ({"model__checkpoint": 0.5}, ("nothing",) * 2 + ("everything",) * 2),
        ({"model__checkpoint": 1, "model__checkpoint_keep": "matmuls"}, ("matmuls",) * 4),
        ({"model__checkpoint": 0.75, "selective_checkpoint": True}, ("attention",) * 3 + ("everything",)),
        ({"selective_checkpoint": True}, ("everything",) * 4),
    ],
)
def test_layers_save_what_the_keys_say(tmp_path: Path, changes: dict[str, Any], saved: tuple[str, ...]) -> None:
    assert saved_by(new(tmp_path, **changes)) == saved


@pytest.fixture
def told() -> Iterator[list[logging.LogRecord]]:
    """What the project logs, each line once, whatever else listens."""
    records: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger("internlm")
    handler.emit = records.append  # type: ignore[method-assign,assignment]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_budget_chooses_and_is_told(tmp_path: Path, told: list[logging.LogRecord]) -> None:
    """32 tokens of 32 channels in fp32: a recomputed layer saves 4 KiB, a whole one 47.25 KiB."""
    layer, least = (4 * 32 + (2 * 4 + 2 * 2) * 8 + 3 * 56 + 2 + 4) * 32 * 4, 32 * 32 * 4
    budget = (2 * layer + 2 * least) / 2**30
    saved = saved_by(new(tmp_path, model__checkpoint_budget=budget))
    # Not two layers that recompute all, but as much less as their room allows.
    assert saved == ("attention", "attention", "matmuls", "everything")
    (line,) = [record.getMessage() for record in told if record.getMessage().startswith("activations: ")]
    assert line.startswith("activations: of 4 layers ")
    everything = saved_by(new(tmp_path / "all", model__checkpoint_budget=4 * layer / 2**30))
    assert everything == ("everything",) * 4


def test_layers_that_predict_later_tokens_share_the_budget(tmp_path: Path) -> None:
    """A recomputed one saves hidden states and embeddings: twice the 4 KiB of another layer."""
    later = {"model__num_nextn_predict_layers": 1}
    assert saved_by(new(tmp_path, **later, model__checkpoint=0.75)) == ("nothing",) * 3 + ("everything",) * 2
    least = 6 * 32 * 32 * 4 / 2**30
    assert saved_by(new(tmp_path / "least", **later, model__checkpoint_budget=least)) == ("nothing",) * 5
    assert saved_by(new(tmp_path / "all", **later, model__checkpoint_budget=1.0)) == ("everything",) * 5
    with pytest.raises(ConfigError, match="a rank with 5 layers saves"):
        changes = {"model.num_nextn_predict_layers": 1, "model.checkpoint_budget": 0.99 * least / 2}
        check_buildable(small_config(changes), 1)
    # Each stage of two layers saves 4 KiB in bf16; the last one has another layer.
    with pytest.raises(ConfigError, match="a rank with 3 layers saves"):
        pipeline = {"parallel.pipeline.size": 2, "model.checkpoint_budget": 3.99 * 32 * 32 * 2 / 2**30}
        check_buildable(small_config({**changes, **pipeline}), 2)


def test_a_budget_that_is_too_small_is_refused_before_any_rank_starts() -> None:
    check_buildable(small_config({"model.checkpoint_budget": 1.0}), 1)
    with pytest.raises(ConfigError, match=r"model\.checkpoint_budget = 1e-06: a rank with 4 layers saves"):
        check_buildable(small_config({"model.checkpoint_budget": 1e-6}), 1)
    # 4 layers of 32 tokens of 32 bf16 channels: 8 KiB; a stage of two has half of it.
    tight = 1.01 * 2 * 32 * 32 * 2 / 2**30
    with pytest.raises(ConfigError, match="a rank with 4 layers"):
        check_buildable(small_config({"model.checkpoint_budget": tight}), 1)
    check_buildable(small_config({"model.checkpoint_budget": tight, "parallel.pipeline.size": 2}), 2)
    with pytest.raises(ConfigError, match="a rank with 3 layers"):
        uneven = {"parallel.pipeline.layer_split": [1, 3], "parallel.pipeline.size": 2}
        check_buildable(small_config({"model.checkpoint_budget": tight, **uneven}), 2)


OFFLOADING = {"cpu_offloading__enable": True, "cpu_offloading__num_layers": 2}
ATTENTION_SAVED = {"model__checkpoint": 0.5, "selective_checkpoint": True, "selective_checkpoint_offload": True}


@pytest.mark.parametrize(
    ("changes", "autograd_layers", "store_layers"),
    [
        (OFFLOADING, {0, 1}, set()),
        (ATTENTION_SAVED, set(), {0, 1}),
        ({**OFFLOADING, **ATTENTION_SAVED}, {0, 1}, {0, 1}),
    ],
    ids=["autograd", "store", "both"],
)
def test_offloading_moves_the_first_layers_and_says_that_a_cpu_gains_nothing(
    tmp_path: Path,
    changes: dict[str, Any],
    autograd_layers: set[int],
    store_layers: set[int],
    told: list[logging.LogRecord],
) -> None:
    offloading = decoder_of(new(tmp_path, **changes)).offloading
    assert offloading is not None
    assert (offloading.autograd_layers, offloading.store_layers) == (autograd_layers, store_layers)
    assert [record.levelname for record in told if "the device is the host" in record.getMessage()] == ["WARNING"]


def train_offloading(folder: Path, changes: dict[str, Any]) -> list[tuple[float, float]]:
    """As `train`, with no tensor too small to move."""
    import internlm.initialize.activation_memory as module
    from internlm.model.offload import Offloading

    class Everything(Offloading):
        def __init__(self, *args: Any, **choice: Any) -> None:
            super().__init__(*args, smallest=1, **choice)

    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    made, module.Offloading = module.Offloading, Everything  # type: ignore[misc]
    try:
        trainer = new(folder / f"rank{rank}", **changes)
        logs = []
        for chunk in trainer.engine.chunks:
            if chunk.offloading is not None:
                chunk.offloading.log = logs
        trainer.fit()
        assert bool(logs) == bool("cpu_offloading__enable" in changes or "selective_checkpoint_offload" in changes)
        trainer.engine.context.close()
    finally:
        module.Offloading = made  # type: ignore[misc]
    return [(line["loss"], line["grad_norm"]) for line in metrics_of(folder / f"rank{rank}")]


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"parallel__pipeline__size": 2, "parallel__pipeline__mode": "ZBV"},
        {"parallel__pipeline__size": 2, "model__num_chunks": 2},
        {"parallel__tensor__size": 2, "parallel__tensor__mode": "msp"},
        {"parallel__weight__size": 2, "parallel__tensor__mode": "isp", "parallel__weight__overlap": True},
        {"parallel__fsdp__enable": True},
        {"parallel__context__size": 2},
    ],
    ids=["alone", "ZBV", "interleaved", "msp", "isp", "FSDP", "context"],
)
def test_offloading_changes_no_bit(layout: dict[str, Any], tmp_path: Path, ranks: Any) -> None:
    """In training: several micro batches, some of them in flight at once, and every way to hold weights."""
    pool: RankPool = ranks(2 if layout else 1)
    data = {"data__micro_num": 4, "data__gradient_accumulation": 4}
    # The main rank writes the metrics.
    plain, *_ = pool.run(train_offloading, tmp_path / "plain", {**data, **layout})
    assert len(plain) == 2
    for name, changes in (
        ("autograd", OFFLOADING),
        ("store", ATTENTION_SAVED),
        ("both", {**OFFLOADING, **ATTENTION_SAVED}),
    ):
        moved, *_ = pool.run(train_offloading, tmp_path / name, {**data, **layout, **changes})
        assert moved == plain, name
