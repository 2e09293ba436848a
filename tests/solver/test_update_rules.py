"""A rule of one's own plugs in through the protocol: sharded, checkpointed and resumed with no change elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from helpers.ranks import RankPool
from helpers.runs import assert_same_bits, new_trainer, train
from helpers.tiny import global_batch, tiny_engine
from torch import Tensor

from internlm.checkpoint.reading import saved_shapes
from internlm.checkpoint.tensor_files import TensorReader
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.solver.optimizer.rules.update_rule import UpdateStep
from internlm.solver.optimizer.state_form import StateForm
from internlm.utils.errors import CheckpointError
from internlm.utils.storage import storage_path


class SignMomentum:
    """Lion without its second coefficient: the sign of an average of gradients, with decoupled weight decay."""

    state_names: ClassVar[tuple[str, ...]] = ("momentum",)
    works_on: ClassVar[Literal["elements", "matrices"]] = "elements"
    hyper_parameters: ClassVar[dict[str, float]] = {"beta": 0.9}

    def update(self, weights: Tensor, gradient: Tensor, state: Mapping[str, Tensor], step: UpdateStep) -> None:
        keep, hyper_parameters = step.skipped.to(torch.bool), step.hyper_parameters
        gradient.copy_(torch.where(keep, gradient, gradient / step.divisor))
        momentum = state["momentum"]
        beta, lr = hyper_parameters["beta"], hyper_parameters["lr"]
        momentum.copy_(torch.where(keep, momentum, beta * momentum + (1 - beta) * gradient))
        updated = weights * (1 - lr * hyper_parameters["weight_decay"]) - lr * momentum.sign()
        weights.copy_(torch.where(keep, weights, updated))

    def was_trained(self, state: Mapping[str, Tensor]) -> Tensor:
        return state["momentum"].any()


def weights_after(zero: int) -> dict[str, Tensor]:
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    context = ParallelContext.create(ParallelLayout(world_size=world, zero=zero))
    engine = tiny_engine(context, rule=SignMomentum(), weight_decay=0.1, reduce_bucket_size=3000)
    for step in range(3):
        engine.train_step(global_batch(step, 4, context.rank, world), {"lr": 1e-3, "beta": 0.5 + 0.1 * step})
    engine.optimizer.finish_gathering()
    weights = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    context.close()
    return weights


def test_it_is_sharded_like_any_other(ranks: Callable[[int], RankPool]) -> None:
    expected = weights_after(1)
    for zero in (1, 2):
        for weights in ranks(2).run(weights_after, zero):
            for name, weight in weights.items():
                # A sign may turn where a sum of gradients is nearly zero: in few elements, which then differ by two
                # learning rates in each of three steps at most.
                differing = ~torch.isclose(weight, expected[name], rtol=1e-5, atol=1e-7)
                assert differing.float().mean() < 0.01, name
                assert (weight - expected[name]).abs().max() <= 3 * 2 * 1e-3 * 1.01, name


@pytest.mark.parametrize("form", [StateForm(), StateForm(moments=torch.bfloat16), StateForm(is_offloaded=True)])
def test_it_resumes_bit_for_bit(tmp_path: Path, form: StateForm) -> None:
    options: dict[str, Any] = {"rule": SignMomentum(), "form": form, "dtype": "torch.bfloat16"}
    straight = train(None, 6, **options)
    train(tmp_path, 3, every=3, **options)
    resumed = train(tmp_path, 6, resume_from=tmp_path / "3", every=6, **options)
    assert_same_bits(resumed["weights"], straight["weights"])
    names = TensorReader(storage_path(tmp_path / "3")).names()
    assert names
    kinds = {key.split("/")[1] for key in saved_keys(tmp_path / "3") if key.startswith("optimizer/")}
    assert kinds == {"master", "momentum"}


def saved_keys(folder: Path) -> set[str]:
    return set(saved_shapes(storage_path(folder)))


def test_values_left_out_are_the_defaults() -> None:
    """And not those of the step before, which a resumed run would not know."""
    engine = tiny_engine(ParallelContext.create(), rule=SignMomentum())
    engine.train_step(global_batch(0), {"lr": 1e-3, "beta": 0.5})
    engine.train_step(global_batch(1), 1e-3)
    assert engine.optimizer.hyper_parameters == {"lr": 1e-3, "beta": 0.9}


class WholeMatrices(SignMomentum):
    """A rule that the optimizer cannot run."""

    works_on: ClassVar[Literal["elements", "matrices"]] = "matrices"


def test_a_rule_on_whole_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match="WholeMatrices works on matrices"):
        tiny_engine(ParallelContext.create(), rule=WholeMatrices())


def test_unknown_hyper_parameters_are_refused() -> None:
    engine = tiny_engine(ParallelContext.create(), rule=SignMomentum())
    with pytest.raises(ValueError, match=r"unknown hyper-parameters \['beta2'\]: the update rule has \['beta', 'lr'\]"):
        engine.train_step(global_batch(0), {"lr": 1e-3, "beta2": 0.9})


def test_the_state_of_another_rule_is_refused(tmp_path: Path) -> None:
    train(tmp_path, 2, every=2)
    other = new_trainer(tmp_path, 3, rule=SignMomentum())
    with pytest.raises(CheckpointError, match="the optimizer state of the checkpoint does not fit this optimizer"):
        new_trainer(tmp_path, 3).checkpointer.load(other, tmp_path / "2")  # type: ignore[union-attr]
