"""Recomputation in the parallel modes: no bit changes, and all ranks exchange the same, no more than they must."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers.tiny import micro_batch, tiny_config
from torch import Tensor

from internlm.core.communication import collectives
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.fsdp import apply_fsdp, local_tensor
from internlm.core.parallel.linear.weight_gathering import GatherPlan
from internlm.core.parallel.model_parallel import ParallelOptions, parallel_of
from internlm.core.parallel.parallelize import parallelize
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.recompute import SavePolicy
from internlm.model.registry import build_model

LAYERS = 3

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mtp": ({"tensor": 2, "mode": "mtp"}, {}),
    "msp": ({"tensor": 2, "mode": "msp"}, {}),
    "fsp": ({"tensor": 2, "mode": "fsp"}, {}),
    "isp": ({"tensor": 2, "mode": "isp"}, {}),
    "isp, split weights": ({"weight": 2, "mode": "isp"}, {}),
    "isp, by layer": (
        {"tensor": 2, "weight": 2, "mode": "isp"},
        {"weight_gathering": GatherPlan(overlap=True, memory_pool=True)},
    ),
    "isp, by module": ({"weight": 2, "mode": "isp"}, {"weight_gathering": GatherPlan(overlap=True, ahead="module")}),
    "fsdp": ({}, {}),
}

RECOMPUTING: tuple[SavePolicy, ...] = ("matmuls", "attention", "nothing")


class Collectives:
    """The names of all collectives in their order, also of those inside of operators."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __enter__(self) -> Collectives:
        self._patches = [
            patch.object(module, name, self._noting(name, getattr(module, name)))
            for module, name in (
                (collectives, "_all_gather"),
                (collectives, "_reduce_scatter"),
                (dist, "all_reduce"),
                (dist, "all_to_all_single"),
            )
        ]
        for active in self._patches:
            active.start()
        return self

    def __exit__(self, *_: object) -> None:
        for active in self._patches:
            active.stop()

    def _noting(self, name: str, function: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            return function(*args, **kwargs)

        return noted


def train(layout: str, model_type: str, changes: dict[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """This rank's loss and gradients of two micro batches, and what it exchanged."""
    sizes, options = LAYOUTS[layout]
    context = ParallelContext.create(ParallelLayout(world_size=2, **sizes))
    with torch.device("meta"):
        model = build_model(model_type, tiny_config(num_layers=LAYERS, **changes))
    model = parallelize(model, context, seed=7, options=ParallelOptions(**options))
    if layout == "fsdp":
        apply_fsdp(model, context)
    parallel = parallel_of(model)
    results = {}
    with Collectives() as exchanged:
        for index in range(2):
            micro = micro_batch(2 * index + context.index("data"), (7, 1, 12, 4))
            assert micro.lengths is not None
            hidden = model(micro.input_ids, micro.position_ids, VarlenMetadata.of(micro.lengths))
            output = parallel.head_loss(model, hidden, micro.labels, micro.type_ids, linear_cross_entropy)
            output.loss.loss_sum.backward()
            results[f"loss {index}"] = output.loss.loss_sum.detach()
        parallel.end_backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        results[name] = local_tensor(parameter.grad).clone()
    context.close()
    return results, exchanged.names


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_policy_changes_a_bit_and_all_ranks_exchange_the_same(layout: str, ranks: Any) -> None:
    """Two ranks add two numbers: the order of sums is always the same."""
    for model_type, changes in (("INTERNLM2", {}), ("LLAMA2", {"qk_norm": True, "mlp_bias": True})):
        expected = [result for result, _ in ranks(2).run(train, layout, model_type, changes)]
        for policy in RECOMPUTING:
            recomputing = {**changes, "checkpoint": 1.0, "checkpoint_save_policy": policy}
            trained = ranks(2).run(train, layout, model_type, recomputing)
            assert trained[0][1] == trained[1][1], "every rank must exchange the same in the same order"
            found = [result for result, _ in trained]
            for rank in range(2):
                assert found[rank].keys() == expected[rank].keys()
                differing = [n for n in expected[rank] if not torch.equal(found[rank][n], expected[rank][n])]
                assert differing == [], policy


# Collectives that a layer repeats in recomputation. The sum behind wo is needed for the norm behind it; that behind w2
# never is, as nothing of the layer follows it.
AGAIN: dict[str, dict[SavePolicy, dict[str, int]]] = {
    "mtp": {policy: {"all_reduce": 1} for policy in RECOMPUTING},
    # The gathered inputs are for the gradients of weights.
    "msp": {policy: {"_all_gather": 2, "_reduce_scatter": 1} for policy in RECOMPUTING},
    # They are gathered for products only.
    "fsp": {
        "matmuls": {"_reduce_scatter": 1},
        "attention": {"_all_gather": 2, "_reduce_scatter": 1},
        "nothing": {"_all_gather": 2, "_reduce_scatter": 1},
    },
    # Queries, keys and values, and the input of wo.
    "isp": {policy: {"all_to_all_single": 2} for policy in RECOMPUTING},
    # Five weights.
    "isp, split weights": {"matmuls": {}, "attention": {"_all_gather": 5}, "nothing": {"_all_gather": 5}},
}
MICRO_BATCHES = 2


@pytest.mark.parametrize("layout", AGAIN)
def test_recomputation_repeats_the_exchanges_of_what_it_repeats(layout: str, ranks: Any) -> None:
    plain, _ = (Counter(names) for _, names in ranks(2).run(train, layout, "INTERNLM2", {}))
    for policy, again in AGAIN[layout].items():
        recomputing = {"checkpoint": 1.0, "checkpoint_save_policy": policy}
        _, names = ranks(2).run(train, layout, "INTERNLM2", recomputing)[0]
        assert Counter(names) - plain == Counter({n: k * LAYERS * MICRO_BATCHES for n, k in again.items()}), policy
