"""Runs with bf16 gradients, bf16 moments or an offloaded state are left and taken up again, in any form and layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.resume import Ranks, optimizer_of, run_row
from helpers.runs import assert_same_bits, new_trainer, train
from torch import Tensor

from internlm.checkpoint.manager import CheckpointManager
from internlm.core.trainer import Trainer
from internlm.solver.optimizer.state_form import FP32_STATE, StateForm
from internlm.verify.case import Combination

BF16 = torch.bfloat16
FORMS = {
    "bf16 gradients": StateForm(gradients=BF16),
    "bf16 moments": StateForm(moments=BF16),
    "offloaded": StateForm(is_offloaded=True),
    "all": StateForm(BF16, BF16, is_offloaded=True),
}


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Masters and moments."""
    optimizer = optimizer_of(trainer)
    return {f"{key} {n}": p.clone() for key, _, pieces in optimizer.sharded_state() for n, (_, p) in enumerate(pieces)}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_ten_steps_are_five_and_five(tmp_path: Path, form: StateForm) -> None:
    straight = train(tmp_path / "straight", 10, dtype="torch.bfloat16", form=form)
    train(tmp_path / "halves", 5, dtype="torch.bfloat16", form=form)
    resumed = train(tmp_path / "halves", 10, tmp_path / "halves" / "5", dtype="torch.bfloat16", form=form)
    assert resumed["losses"] == straight["losses"][5:]
    assert resumed["norms"] == straight["norms"][5:]
    assert_same_bits(resumed["weights"], straight["weights"])


@pytest.mark.parametrize(
    "text",
    [
        "ranks=2 layout:tensor=2,mode=isp,weight=2 model:dtype=bfloat16 stepping:grad_bf16,moments_bf16,offload",
        "ranks=2 layout:fsdp model:dtype=bfloat16 stepping:grad_bf16,moments_bf16",
        "ranks=4 layout:pipeline=2 model:dtype=bfloat16 stepping:moments_bf16,overlap_grad",
    ],
)
def test_one_process_and_a_layout_go_on_from_each_other(ranks: Ranks, tmp_path: Path, text: str) -> None:
    row = run_row(Combination.parse(text), ranks, tmp_path)
    assert row.straight.is_equal, row.straight.explain()
    assert not any(row.resumed), row.resumed
    assert row.loaded == []
    assert row.from_one_process.is_equal, row.from_one_process.explain()


@pytest.mark.parametrize(("saved", "loaded"), [(torch.float32, BF16), (BF16, torch.float32)])
def test_moments_are_loaded_in_another_dtype(tmp_path: Path, saved: torch.dtype, loaded: torch.dtype) -> None:
    """Rounded to the nearest, or exactly; masters and the place in the run as they were."""
    train(tmp_path, 5, dtype="torch.bfloat16", form=StateForm(moments=saved))
    before, after = (
        new_trainer(tmp_path, 6, dtype="torch.bfloat16", form=StateForm(moments=dtype)) for dtype in (saved, loaded)
    )
    for trainer in (before, after):
        assert isinstance(trainer.checkpointer, CheckpointManager)
        trainer.checkpointer.load(trainer, tmp_path / "5")
    expected, found = state_of(before), state_of(after)
    for key, tensor in expected.items():
        assert tensor.dtype == (torch.float32 if key.startswith("master") else saved)
    assert_same_bits(found, {key: t if key.startswith("master") else t.to(loaded) for key, t in expected.items()})
    after.fit()
    assert optimizer_of(after).num_updates == 6


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_an_offloaded_state_is_loaded_anywhere(tmp_path: Path, is_offloaded: bool) -> None:
    """And saved in the background from where it lies."""
    form = StateForm(is_offloaded=is_offloaded)
    straight = train(None, 7, dtype="torch.bfloat16", form=FP32_STATE)
    first = new_trainer(None, 5, dtype="torch.bfloat16", form=form)
    first.fit()
    manager = CheckpointManager(tmp_path, async_save=True)
    manager.save(first)
    manager.finish()
    other = StateForm(is_offloaded=not is_offloaded)
    resumed = train(tmp_path / "resumed", 7, tmp_path / "5", dtype="torch.bfloat16", form=other)
    assert resumed["losses"] == straight["losses"][5:]
    assert_same_bits(resumed["weights"], straight["weights"])
