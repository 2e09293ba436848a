"""A run that cannot learn ends, and says what is not finite or where the labels are."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import metrics_of, write_config
from helpers.ranks import RankPool
from torch import Tensor

from internlm.config.loader import load_config
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.fsdp import local_tensor
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.core.trainer import Trainer
from internlm.data.tokenized_files.writer import TokenizedWriter
from internlm.initialize.build import build_layout, build_trainer
from internlm.utils.errors import CheckpointError, TrainingError
from internlm.utils.logging import ROOT_LOGGER


def new(folder: Path, **changes: Any) -> Trainer:
    """A trainer of the tiny config; `changes` are keys with `__` for a dot."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    loaded = load_config(write_config(folder), overrides, world_size=world)
    context = ParallelContext.create(build_layout(loaded.config, world))
    return build_trainer(loaded.config, context, folder / "run")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the project logs."""
    monkeypatch.setattr(logging.getLogger(ROOT_LOGGER), "propagate", True)
    caplog.set_level(logging.INFO, ROOT_LOGGER)
    return caplog


def failure_of(trainer: Trainer) -> str:
    with pytest.raises(TrainingError) as caught:
        trainer.fit()
    return str(caught.value)


def spoil_backward_of_layer(trainer: Trainer, layer: int, first_step: int = 0) -> None:
    """The gradient of a layer's output is NaN from some step on."""

    def spoil(module: Any, args: Any, output: Tensor) -> Tensor:
        if output.requires_grad and trainer.state.step >= first_step:
            output.register_hook(lambda gradient: gradient * torch.nan)
        return output

    for chunk in trainer.engine.chunks:
        layers: Any = chunk.layers
        if str(layer) in layers:
            layers[str(layer)].register_forward_hook(spoil)


NOT_SAVED = {"ckpt__enable_save_ckpt": False, "monitor__max_skipped_updates": 3}


def test_a_run_without_updates_ends_and_names_the_gradient(tmp_path: Path) -> None:
    trainer = new(tmp_path, **NOT_SAVED)
    spoil_backward_of_layer(trainer, 0, first_step=2)
    message = failure_of(trainer)
    assert message.startswith("step 5: 3 consecutive updates were skipped for inf or NaN gradients")
    assert re.search(
        r"all weights are finite, the gradients of \d+ are not, .* reaches is that of 'layers\.0\.", message
    )
    assert "(layer 0, on rank 0)" in message
    # One step later the numbers of the fifth step have come without a wait; the run ends there.
    assert trainer.state.step == 6


def test_skips_that_are_not_in_a_row_do_not_end_a_run(tmp_path: Path) -> None:
    trainer = new(tmp_path, **NOT_SAVED)
    loss = trainer.engine.loss

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        output = loss(*args, **kwargs)
        return output._replace(loss_sum=output.loss_sum * (torch.nan if trainer.state.step % 3 else 1.0))

    trainer.engine.loss = spoiled  # type: ignore[assignment]
    assert trainer.fit().step == 10
    assert float(trainer.num_skipped_updates) == 6


def test_a_short_run_without_any_update_fails(tmp_path: Path) -> None:
    trainer = new(tmp_path, ckpt__enable_save_ckpt=False, data__total_steps=4)
    spoil_backward_of_layer(trainer, 1)
    message = failure_of(trainer)
    assert message.startswith("every update of this run was skipped: all weights are finite, the gradients of ")


def test_a_run_that_ends_with_skipped_updates_says_so(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    trainer = new(tmp_path, ckpt__enable_save_ckpt=False, data__total_steps=4)
    spoil_backward_of_layer(trainer, 1, first_step=2)
    trainer.fit()
    assert "the last 2 updates of the run were skipped for inf or NaN gradients" in log.text


@pytest.mark.parametrize(("limit", "last"), [(3, 3), (0, 10)])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, limit: int, last: int) -> None:
    trainer = new(tmp_path, ckpt__enable_save_ckpt=False, monitor__max_skipped_updates=limit)
    spoil_weight(trainer, "layers.1.attention.wo.weight")
    if limit == 0:
        assert trainer.fit().step == 10
        return
    message = failure_of(trainer)
    assert message.startswith(f"step {last}: 3 consecutive updates")
    assert "not finite: 1 weight(s), the first one is 'layers.1.attention.wo.w" in message
    assert "(layer 1, on rank 0)" in message


def spoil_weight(trainer: Trainer, name: str) -> None:
    """The last element of a weight becomes NaN on the rank that holds it."""
    found = [p for chunk in trainer.engine.chunks for p in chunk.parameters() if shard_spec_of(p).name == name]
    for parameter in found:
        spec, local = shard_spec_of(parameter), local_tensor(parameter)
        for box in spec.boxes:
            ends = [start + size for start, size in zip(box.global_offset, box.size, strict=True)]
            if ends == list(spec.global_shape):
                with torch.no_grad():
                    local[tuple(stop - 1 for stop in box.local_stop)] = torch.nan
    trainer.engine.optimizer.reset_masters()  # type: ignore[attr-defined]


FP16 = {
    **NOT_SAVED,
    "model__dtype": "torch.float16",
    "grad_scaler__fp16__growth_interval": 100,
    "grad_scaler__hysteresis": 1,
}


def test_the_overflows_with_which_a_dynamic_scale_begins_are_no_failure(tmp_path: Path) -> None:
    trainer = new(tmp_path, **FP16, grad_scaler__fp16__initial_scale=2.0**24)
    assert trainer.fit().step == 10
    lines = metrics_of(tmp_path / "run")
    assert 3 < lines[-1]["inf_nan_skip_batches"] < 10


def test_overflows_at_the_smallest_scale_count(tmp_path: Path) -> None:
    trainer = new(tmp_path, **FP16, grad_scaler__fp16__initial_scale=4.0)
    spoil_backward_of_layer(trainer, 1)
    assert failure_of(trainer).startswith("step 5: 3 consecutive updates")  # scales 4, 2, then three times 1


def test_a_loss_that_is_not_finite_is_no_matter_of_scale(tmp_path: Path) -> None:
    trainer = new(tmp_path, **FP16)
    spoil_weight(trainer, "layers.0.feed_forward.w1.weight")
    assert failure_of(trainer).startswith("step 3: 3 consecutive updates")


def test_the_rank_that_holds_it_is_named_on_all_ranks(tmp_path: Path, ranks: Callable[[int], RankPool]) -> None:
    first, second = ranks(2).run(failures_of_two_ranks, tmp_path)
    assert first == second
    assert "the first one is 'layers.1.attention.wo.weight' (layer 1, on rank 1)" in first[0]
    assert "is that of 'layers.0." in first[1] and "(layer 0, on rank 0)" in first[1]


def failures_of_two_ranks(folder: Path) -> list[str]:
    """With a weight, and with a gradient that is not finite; the layers are on two stages of a pipeline."""
    messages = []
    for spoil in (
        partial(spoil_weight, name="layers.1.attention.wo.weight"),
        partial(spoil_backward_of_layer, layer=0),
    ):
        trainer = new(folder, **NOT_SAVED, parallel__pipeline__size=2)
        spoil(trainer)
        messages.append(failure_of(trainer))
    return messages


@pytest.mark.parametrize("part", ["weight", "moment"])
def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path: Path, part: str) -> None:
    trainer = new(tmp_path, data__total_steps=2)
    if part == "weight":
        spoil_weight(trainer, "output.weight")
        trainer.state.step = 1
        trainer.save_checkpoint()
        name = "'output.weight' (on rank 0)"
    else:
        trainer.engine.optimizer.states[0].tensors["exp_avg_sq"].fill_(torch.inf)  # type: ignore[attr-defined]
        trainer.state.step = 1
        trainer.save_checkpoint()
        name = "'exp_avg_sq/"
    with pytest.raises(CheckpointError) as caught:
        new(tmp_path)
    assert f"{tmp_path}/checkpoints/1' has an inf or NaN in {name}" in str(caught.value)


# -- labels ---------------------------------------------------------------------------------------------------------


def masked_folder(folder: Path, prompt: int, answer: int) -> Path:
    """Sixteen documents, each with a masked prompt."""
    with TokenizedWriter(folder / "data" / "en" / "a.bin") as writer:
        for number in range(16):
            writer.write([-(1 + number)] * prompt + [50] * answer)
    return folder / "data"


def test_an_epoch_without_a_label_ends_the_run(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    folder = masked_folder(tmp_path, prompt=32, answer=0)
    trainer = new(tmp_path, data__train_folder=folder, ckpt__enable_save_ckpt=False)
    message = failure_of(trainer)
    assert message.startswith("step 8: no token of the last 16 samples had a label, at least one epoch (16 samples)")
    assert "every token is masked (negative in the .bin); see doc/data.md" in message
    assert [line for line in log.messages if "has a label" in line] == [
        "step 1: no token of the global batch has a label. The likely reason: every token is masked (negative in the "
        ".bin); see doc/data.md"
    ]
    shown = next(line for line in log.messages if line.startswith("step 1/10"))
    assert "no label" in shown and "loss" not in shown and "nan" not in shown
    assert not {"loss", "acc", "perplexity"} & metrics_of(tmp_path / "run")[0].keys()


def test_a_short_run_without_a_label_fails_after_it_saved(tmp_path: Path) -> None:
    folder = masked_folder(tmp_path, prompt=20, answer=5)
    trainer = new(tmp_path, data__train_folder=folder, data__use_packed_dataset=False, data__total_steps=2)
    message = failure_of(trainer)
    assert message.startswith("no step of this run had a token with a label")
    assert "or every prompt is longer than data.seq_len = 16, where documents are truncated" in message
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_some_labels_are_enough(tmp_path: Path) -> None:
    folder = masked_folder(tmp_path, prompt=30, answer=2)
    assert new(tmp_path, data__train_folder=folder, ckpt__enable_save_ckpt=False).fit().step == 10
