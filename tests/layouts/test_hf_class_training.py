"""Five steps with classes of transformers, against a handwritten loop: the class itself, torch's clipping and AdamW.

The loop computes every document alone and shares nothing but the batches. `test_hf_class_layouts.py` compares layouts
with runs of one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.hf_classes import tiny_class
from helpers.hf_runs import hf_case
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.config.schema import Config
from internlm.data.batch import Batch
from internlm.initialize.build import build_engine
from internlm.initialize.stages import build_chunks
from internlm.verify.batches import local_batch
from internlm.verify.run import start_case

pytest.importorskip("transformers")

CLASSES = (
    "llama",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "phi",
    "olmo2",
    "glm4",
    "smollm3",
    "granite",
    "cohere",
    "stablelm",
    "nemotron",
    "mixtral",
    "gpt_oss",
)
EAGER = ("gemma2", "gpt_oss")
"""Classes with capped scores or sinks, whose attention transformers computes in no other way."""

LEARNING_RATES = (2e-4, 1e-3, 7e-4, 4e-4, 1e-4)
"""Warm-up and decay."""

REPORTED = 4 * torch.finfo(torch.float32).eps
"""Of losses and norms, which the engine reports in fp32. All else is in float64, but for what the classes themselves
compute in fp32: norms and rotary angles."""

CHANGED = 50 * torch.finfo(torch.float32).eps
"""Of the change of a weight in five steps. Rounding of these norms is carried through 4 layers and both passes. If
norms decay too, the difference is 0.1 and more."""


class Step(NamedTuple):
    """Loss and norm before clipping, as both loops report them."""

    loss: float
    norm: float


@pytest.mark.parametrize("family", CLASSES)
def test_five_steps_are_those_of_the_class_with_adamw(family: str, tmp_path: Path) -> None:
    case = hf_case("ranks=1 model:dtype=float64 stepping:clip=0.1", family, tmp_path)
    reference = tiny_class(family).double()
    reference.set_attn_implementation("eager" if family in EAGER else "sdpa")
    reference.set_experts_implementation("eager")
    # A padding token is trained like any other, as the log of a run says.
    reference.get_input_embeddings().padding_idx = None
    initial = {name: values.clone() for name, values in reference.state_dict().items()}
    context = start_case(case)
    chunks = build_chunks(case.config, context)
    for name, parameter in chunks[0].named_parameters():
        parameter.data.copy_(initial[name])
    engine = build_engine(case.config, context, chunks, type_names=["all"])
    batches = [local_batch(case, step, 0, 1) for step in range(len(LEARNING_RATES))]

    expected = list(handwritten_loop(reference, case.config, batches))
    for batch, rate, step in zip(batches, LEARNING_RATES, expected, strict=True):
        result = engine.train_step(batch, rate)
        assert float(result.loss) == pytest.approx(step.loss, rel=REPORTED)
        assert float(result.grad_norm) == pytest.approx(step.norm, rel=REPORTED)
        assert step.norm > case.config.hybrid_zero_optimizer.clip_grad_norm
    trained = reference.state_dict()
    for name, parameter in chunks[0].named_parameters():
        change = (trained[name] - initial[name]).norm()
        if parameter.requires_grad:
            assert (parameter.detach() - trained[name]).norm() <= CHANGED * change, name
        else:
            assert torch.equal(parameter, initial[name]), name


def handwritten_loop(model: nn.Module, config: Config, batches: list[Batch]) -> Iterator[Step]:
    """Train the class on the documents of these batches; norms and biases do not decay."""
    adam = config.adam
    matrices = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": adam.weight_decay}
    others = {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, others], betas=(adam.adam_beta1, adam.adam_beta2), eps=adam.adam_eps)
    for batch, rate in zip(batches, LEARNING_RATES, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        num_labels = sum(micro.num_valid_tokens for micro in batch.micro_batches)
        loss = sum_of_losses(model, batch) / num_labels
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.hybrid_zero_optimizer.clip_grad_norm)
        optimizer.step()
        yield Step(float(loss.detach()), float(norm))


def sum_of_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Of all tokens with a label, document by document."""
    total = torch.zeros((), dtype=torch.float64)
    for micro in batch.micro_batches:
        assert micro.lengths is not None
        for ids, labels in zip(
            micro.input_ids.split(micro.lengths, 1), micro.labels.split(micro.lengths, 1), strict=True
        ):
            logits = model(input_ids=ids, use_cache=False).logits
            total = total + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total
