"""Classes of transformers in this package: logits and gradients of the class itself, document by document."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.hf_classes import TINY, VOCAB, tiny_class
from helpers.hf_runs import hf_model_config
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parallelize import parallelize
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.registry import build_model
from internlm.utils.errors import ConfigError

pytest.importorskip("transformers")

LENGTHS = (11, 14, 7)
REFUSED = {"mamba", "bloom"}
FAMILIES = [family for family in TINY if family not in REFUSED]


def build(family: str, folder: Path) -> nn.Module:
    with torch.device("meta"):
        model = build_model("hf", hf_model_config(family, folder))
    return parallelize(model, ParallelContext.create(device=torch.device("cpu")))


def with_weights_of(model: nn.Module, reference: nn.Module) -> nn.Module:
    state = reference.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])
    return model


def test_attention_that_cannot_be_replaced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"computes no attention|cannot run from"):
        build("bloom", tmp_path)


def test_dropout_is_refused(tmp_path: Path) -> None:
    config = hf_model_config("gpt2", tmp_path, resid_pdrop=0.1)
    with torch.device("meta"), pytest.raises(ConfigError, match="drops 10% of its values"):
        build_model("hf", config)


def test_dropout_of_attention_is_refused(tmp_path: Path) -> None:
    config = hf_model_config("llama", tmp_path, attention_dropout=0.2)
    with torch.device("meta"), pytest.raises(ConfigError, match="drops 20% of its attention weights"):
        build_model("hf", config)


def test_a_class_that_cannot_be_built_from_its_config_is_named(tmp_path: Path) -> None:
    config = hf_model_config("llama", tmp_path, hidden_act="no_such_activation")
    with (
        torch.device("meta"),
        pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot be built .*no_such_activation"),
    ):
        build_model("hf", config)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_have_the_losses_and_gradients_of_separate_ones(family: str, tmp_path: Path) -> None:
    reference = tiny_class(family)
    model = with_weights_of(build(family, tmp_path), reference)
    ids = torch.randint(3, VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)

    expected_logits: list[Tensor] = []
    expected_loss = torch.zeros(())
    for document, label in zip(ids.split(LENGTHS, 1), labels.split(LENGTHS, 1), strict=True):
        logits = reference(input_ids=document, use_cache=False).logits
        expected_logits.append(logits)
        expected_loss = expected_loss + F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="sum")
    expected_loss.backward()

    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    hidden = model(ids, positions, VarlenMetadata.of(LENGTHS))
    torch.testing.assert_close(model.logits(hidden), torch.cat(expected_logits, 1), rtol=1e-5, atol=2e-5)
    loss = linear_cross_entropy(
        hidden.flatten(0, 1), model.head_weight(), labels.flatten(), softcap=model.logit_softcap
    ).loss_sum
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and gradients.get(name) is not None:
            largest = gradients[name].abs().max()
            assert parameter.grad is not None, name
            assert (parameter.grad - gradients[name]).abs().max() <= 2e-5 * largest + 1e-6, name


def test_layers_are_recomputed_with_the_documents_of_their_own_micro_batch(tmp_path: Path) -> None:
    """A pipeline computes further micro-batches before the backward pass of the first."""
    model = with_weights_of(build("llama", tmp_path), tiny_class("llama"))
    ids = torch.randint(3, VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    found = []
    for policy in ("everything", "nothing"):
        for layer in model.numbered_layers().values():
            layer.save_policy = policy
        model.zero_grad()
        first = model(ids, positions, VarlenMetadata.of(LENGTHS))
        model(ids, torch.arange(sum(LENGTHS)).unsqueeze(0), VarlenMetadata.of((sum(LENGTHS),)))
        first.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())
