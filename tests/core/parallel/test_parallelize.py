"""From a meta model to weights that depend on seed and names alone."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

import pytest
import torch
from helpers.ranks import RankPool
from helpers.tiny import tiny_config, tiny_model
from torch import Tensor, nn

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parallelize import parallelize, roles_by_module
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.model.registry import build_model
from internlm.model.roles import Role


def weights(**changes: object) -> dict[str, Tensor]:
    model = tiny_model(ParallelContext.create(), **changes)  # type: ignore[arg-type]
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_weights_depend_on_seed_and_name_only(ranks: Callable[[int], RankPool]) -> None:
    reference = weights()
    torch.manual_seed(12345)
    again = weights()
    for on_rank in (again, *ranks(2).run(weights)):
        assert on_rank.keys() == reference.keys()
        assert all(torch.equal(on_rank[name], reference[name]) for name in reference)
    other = weights(seed=8)
    assert not torch.equal(other["output.weight"], reference["output.weight"])
    # A deeper model has the same first layers.
    deeper = weights(num_layers=3, use_scaled_init=False)
    shallow = weights(num_layers=2, use_scaled_init=False)
    assert all(torch.equal(deeper[name], shallow[name]) for name in shallow)


def test_bf16_weights_are_the_rounded_fp32_ones() -> None:
    full, half = weights(), weights(dtype="torch.bfloat16")
    assert all(torch.equal(full[name].bfloat16(), half[name]) for name in full)


def test_every_parameter_has_a_spec_with_its_global_name() -> None:
    model = tiny_model(ParallelContext.create())
    for name, parameter in model.named_parameters():
        spec = shard_spec_of(parameter)
        assert spec.name == name
        assert spec.global_shape == tuple(parameter.shape)
        assert not parameter.is_meta


def test_tied_weights_stay_one_parameter() -> None:
    with torch.device("meta"):
        model = nn.Module()
        model.a = nn.Linear(3, 3, bias=False)
        model.b = nn.Linear(3, 3, bias=False)
        model.b.weight = model.a.weight
        from internlm.model.initialization import Normal, set_initializer

        set_initializer(model.a.weight, Normal(1.0))
    parallelize(model, ParallelContext.create())
    assert model.a.weight is model.b.weight
    assert shard_spec_of(model.b.weight).name == "a.weight"


def test_every_matrix_of_the_decoder_has_a_role() -> None:
    with torch.device("meta"):
        model = build_model("INTERNLM2", tiny_config())
    roles = roles_by_module(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            assert roles[name] is not Role.REPLICATED, name
    assert fnmatchcase("layers.0.attention.wo", "layers.*.attention.wo")
    assert roles["layers.1.attention.wo"] is Role.ATTENTION_OUT


def test_a_model_that_already_has_storage_is_refused() -> None:
    with pytest.raises(ValueError, match='parameter "weight" already has storage'):
        parallelize(nn.Linear(2, 2), ParallelContext.create())
