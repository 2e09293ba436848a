"""Nothing in a step waits for the device, but where numbers are shown. The same on a GPU: tests/cuda."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers.configs import small_config
from helpers.host_waits import host_waits
from helpers.ranks import RankPool

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.hooks import Hook
from internlm.initialize.build import build_layout, build_trainer

# What a step on the CPU does and one on a GPU does not, or what is on the host in either case.
ALLOWED = {
    "model/ops/cross_entropy.py: _first_largest: nonzero": "a CPU alone looks for the place of a maximum so",
    "model/ops/cross_entropy.py: _clear_rows: nonzero": "a CPU alone looks for the rows without a label so",
    "core/step_metrics.py: numbers: tolist": "of the copy on the host, which had a step's time to come",
    "model/ops/grouped_linear.py: _sizes: tolist": "a CPU alone loops over the experts",
}

ALLOWED_WITH_A_CAPACITY = {
    "model/moe/expert_order.py: of: _local_scalar_dense": "the host needs the number of rows that are not dropped",
}

ALLOWED_IN_EXCHANGES = {
    "core/run_control.py: agree: tolist": "of the ranks' votes, which are summed on the host",
    "core/parallel/experts/exchanged_experts.py: wait: tolist": "the host needs the numbers of rows that ranks send",
}

EXPERTS = {
    "model_type": "QWEN2MOE",
    "model.num_experts": 4,
    "model.top_k": 2,
    "model.num_shared_experts": 1,
    "model.moe_type": "Dropless",
    "loss.moe_loss_coeff": 0.1,
    "loss.moe_z_loss_coeff": 0.01,
    "loss.moe_sequence_loss_coeff": 0.01,
    "model.moe_layer_kwargs": {"selection_bias": True},
    "loss.moe_bias_update_rate": 0.01,
}


class Watch(Hook):
    """Collects the waits between two steps' starts; the first of the hooks, so that it sees all others."""

    name = "watch"

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.found: list[str] = []
        self._open = ExitStack()

    def on_step_start(self, trainer: Any) -> None:
        if trainer.state.step == self.first:
            self.found = self._open.enter_context(host_waits())
        if trainer.state.step == self.last:
            self._open.close()


def waits_of_steady_steps(
    folder: Path, changes: dict[str, Any], plant: Callable[[Any], None] | None = None, world_size: int = 1
) -> set[str]:
    """Where the third to fifth step of a run wait, with all hooks on and nothing shown on the console."""
    values = {
        "data.micro_num": 2,
        "data.total_steps": 7,
        "data.num_worker": 0,
        "data.empty_cache_and_diag_interval": 50,
        "model.dtype": "torch.float32",
        "hybrid_zero_optimizer.clip_grad_norm": 1.0,
        "monitor.log_every": 100,
        **changes,
    }
    config = small_config(values)
    trainer = build_trainer(config, ParallelContext.create(build_layout(config, world_size)), folder)
    trainer.hooks.insert(0, watch := Watch(2, 5))
    if plant is not None:
        plant(trainer)
    trainer.fit()
    return set(watch.found)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data.use_packed_dataset": False},
        {"data.fixed_random_dataset_seqlen": False},
        {"model.dtype": "torch.bfloat16", "model.checkpoint": 1.0},
        {"model.dtype": "torch.float16"},  # with its loss scale
        {"model.dtype": "torch.bfloat16", "float8.enable_float8_linear": True},
        {"model.dtype": "torch.bfloat16", "adam.moments_dtype": "torch.bfloat16"},
        {"model.dtype": "torch.bfloat16", "hybrid_zero_optimizer.grad_accumulation_dtype": "torch.bfloat16"},
        {"model.dtype": "torch.bfloat16", "model.checkpoint": 1.0, "model.checkpoint_save_policy": "attention"},
        {"model.dtype": "torch.float16", "lr_scheduler.advance": "update"},
        {"parallel.tensor.mode": "isp", "loss.label_smoothing": 0.1},
        {**EXPERTS, "model.dtype": "torch.bfloat16"},
        {**EXPERTS, "model.checkpoint": 1.0, "model.checkpoint_save_policy": "attention"},
        {**EXPERTS, "model_type": "MIXTRALMOE", "model.moe_layer_kwargs": {"scoring_func": "sigmoid", "n_group": 2}},
        {"model.rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4}},
    ],
    ids=str,
)
def test_a_step_that_shows_nothing_waits_for_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert waits_of_steady_steps(tmp_path, changes) <= ALLOWED.keys()


@pytest.mark.parametrize(
    ("moe_type", "keys"),
    [
        ("Dropless", {"capacity_factor": 0.5, "noisy_gate_policy": "Jitter"}),
        ("GShard", {"capacity_factor": 0.5, "use_fused_gating": False, "selection_bias": True}),
    ],
)
def test_a_capacity_waits_for_the_number_of_rows(tmp_path: Path, moe_type: str, keys: dict[str, Any]) -> None:
    changes = {**EXPERTS, "model.moe_type": moe_type, "model.moe_layer_kwargs": keys, "loss.moe_bias_update_rate": 0.0}
    waits = waits_of_steady_steps(tmp_path, {**changes, "data.use_packed_dataset": False, "model.checkpoint": 1.0})
    assert waits - ALLOWED.keys() == ALLOWED_WITH_A_CAPACITY.keys()


@pytest.mark.parametrize("checkpoint", [0.0, 1.0])
@pytest.mark.parametrize("layout", [{}, {"parallel.tensor": {"size": 2, "mode": "mtp"}}], ids=["data", "mtp"])
def test_an_exchange_of_experts_waits_once(
    tmp_path: Path, layout: dict[str, Any], checkpoint: float, ranks: Callable[[int], RankPool]
) -> None:
    changes = {**EXPERTS, **layout, "parallel.expert": {"size": 2}, "model.checkpoint": checkpoint}
    for waits in ranks(2).run(waits_of_steady_steps, tmp_path, changes, None, 2):
        assert waits <= ALLOWED.keys() | ALLOWED_IN_EXCHANGES.keys()
        assert ALLOWED_IN_EXCHANGES.keys() <= waits


def waits_without_exchanges(folder: Path, changes: dict[str, Any]) -> set[str]:
    """Those of two ranks, which must send no tokens of one another."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an all-to-all")

    with patch.object(dist, "all_to_all_single", refuse):
        return waits_of_steady_steps(folder, changes, None, 2)


@pytest.mark.parametrize(
    "layout",
    [
        {"parallel.tensor.mode": "isp", "parallel.expert_weight": {"size": 2, "overlap": True}},
        {"parallel.tensor": {"size": 2, "mode": "mtp"}, "parallel.expert": {"size": 1, "no_tp": False}},
    ],
    ids=["gathered", "split"],
)
def test_with_all_experts_on_each_rank_nothing_is_waited_for(
    tmp_path: Path, layout: dict[str, Any], ranks: Callable[[int], RankPool]
) -> None:
    changes = {**EXPERTS, "parallel.expert.size": 1, **layout, "model.checkpoint": 1.0}
    for waits in ranks(2).run(waits_without_exchanges, tmp_path, changes):
        assert waits <= ALLOWED.keys() | {"core/run_control.py: agree: tolist"}


class Plant(Hook):
    """Does something at the end of every step."""

    def __init__(self, act: Callable[[torch.Tensor], Any]) -> None:
        self.act = act

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        self.act(metrics.loss)


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (lambda loss: loss.item(), "_local_scalar_dense"),
        (lambda loss: float(loss), "_local_scalar_dense"),
        (lambda loss: loss if loss > 0 else None, "_local_scalar_dense"),
        (lambda loss: loss.tolist(), "tolist"),
        (lambda loss: loss.cpu(), "cpu"),
        (lambda loss: loss.numpy(), "numpy"),
        (lambda loss: loss.to("cpu"), "to(device)"),
        (lambda loss: loss.view(1)[loss.view(1) > 0], "index by a mask"),
        (lambda loss: loss.view(1).nonzero(), "nonzero"),
        (lambda loss: torch.equal(loss, loss), "equal"),
        (lambda loss: torch.tensor(1.0, device=loss.device), "tensor"),
    ],
)
def test_each_kind_of_wait_is_seen(tmp_path: Path, act: Callable[[torch.Tensor], Any], what: str) -> None:
    def plant(trainer: Any) -> None:
        trainer.hooks.append(Plant(act))

    found = waits_of_steady_steps(tmp_path, {}, plant) - ALLOWED.keys()
    assert [place.rpartition(": ")[2] for place in found] == [what]


def test_a_wait_inside_of_the_backward_pass_is_seen_with_its_place(tmp_path: Path) -> None:
    def plant(trainer: Any) -> None:
        loss = trainer.engine.loss

        class Reads(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x.view_as(x)

            @staticmethod
            def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
                assert grad.item() is not None
                return grad

        def planted(*args: Any, **kwargs: Any) -> Any:
            output = loss(*args, **kwargs)
            return output._replace(loss_sum=Reads.apply(output.loss_sum))

        trainer.engine.loss = planted

    found = waits_of_steady_steps(tmp_path, {}, plant) - ALLOWED.keys()
    assert len(found) == 1 and "_local_scalar_dense" in found.pop()


def test_a_step_waits_for_its_numbers_when_somebody_wants_them(tmp_path: Path) -> None:
    def without_health(trainer: Any) -> None:
        trainer.hooks = [hook for hook in trainer.hooks if hook.name != "health"]

    nobody = {"monitor.metrics_file": False, "enable_tb": False}
    numbers = "core/step_metrics.py: numbers: tolist"
    assert numbers not in waits_of_steady_steps(tmp_path / "silent", nobody, without_health)
    assert numbers in waits_of_steady_steps(tmp_path / "shown", {**nobody, "monitor.log_every": 1}, without_health)
