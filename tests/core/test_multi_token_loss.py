"""Layers that predict later tokens, against the formulas of DeepSeek-V3, written as loops over documents in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from torch import Tensor
from torch.nn import functional as F

from internlm.core import multi_token_loss
from internlm.core.multi_token_loss import LaterTokens, later_tokens
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.data.batch import IGNORE_INDEX, Batch, MicroBatch
from internlm.verify.case import Case, Combination, changed
from internlm.verify.run import CaseRun, start_case

NUM_LAYERS, NUM_HEADS, HEAD_DIM, EPS, VOCAB = 2, 4, 8, 1e-5, 64
COEFFICIENT = 0.7
LENGTHS = ((1, 2, 3, 10), (16,), (4, 12))
"""Of the documents of each micro-batch; two positions later, the first ones have no token."""


# -- the formulas, of one document -------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def rotated(x: Tensor) -> Tensor:
    """`[T, H, d]` at positions 0 ... T - 1; the angles are fp32, as those of a model are."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = (torch.arange(x.shape[0])[:, None] * frequencies).double()[:, None]
    first, second = x.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def block(x: Tensor, w: dict[str, Tensor], layer: int) -> Tensor:
    """A decoder layer, `[T, h]` -> `[T, h]`."""

    def weight(name: str) -> Tensor:
        return w[f"layers.{layer}.{name}.weight"]

    normed = norm(x, weight("attention_norm"))
    q, k, v = (
        (normed @ weight(f"attention.{name}").T).view(len(x), NUM_HEADS, HEAD_DIM) for name in ("wq", "wk", "wv")
    )
    scores = torch.einsum("qhd,khd->hqk", rotated(q), rotated(k)) / math.sqrt(HEAD_DIM)
    causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(~causal, -math.inf).softmax(-1), v)
    x = x + mixed.flatten(1) @ weight("attention.wo").T
    normed = norm(x, weight("ffn_norm"))
    gate = F.silu(normed @ weight("feed_forward.w1").T) * (normed @ weight("feed_forward.w3").T)
    return x + gate @ weight("feed_forward.w2").T


def losses_of(tokens: Tensor, labels: Tensor, w: dict[str, Tensor], num_later: int) -> list[tuple[Tensor, int, int]]:
    """(sum of the cross entropy, number of correct predictions, number of labels) of the model, and of each layer
    behind it, in one document."""

    def cross_entropy(hidden: Tensor, targets: Tensor) -> tuple[Tensor, int, int]:
        logits = hidden @ w.get("output.weight", w["tok_embeddings.weight"]).T
        pairs = [(row, int(target)) for row, target in zip(logits, targets, strict=False) if target != IGNORE_INDEX]
        terms = [-row.log_softmax(-1)[target] for row, target in pairs]
        num_correct = sum(max(range(VOCAB), key=row.tolist().__getitem__) == target for row, target in pairs)
        return sum(terms, torch.zeros((), dtype=torch.float64)), num_correct, len(terms)

    embedded = w["tok_embeddings.weight"][tokens]
    hidden = embedded
    for layer in range(NUM_LAYERS):
        hidden = block(hidden, w, layer)
    hidden = norm(hidden, w["norm.weight"])
    found = [cross_entropy(hidden, labels)]
    for m in range(1, num_later + 1):
        prefix = f"layers.{NUM_LAYERS + m - 1}"
        # Equation 21: positions that have a token m positions later.
        hidden = hidden[: max(0, len(tokens) - m)]
        joined = [norm(embedded[m:], w[f"{prefix}.enorm.weight"]), norm(hidden, w[f"{prefix}.hnorm.weight"])]
        hidden = block(torch.cat(joined, -1) @ w[f"{prefix}.eh_proj.weight"].T, w, NUM_LAYERS + m - 1)
        hidden = norm(hidden, w[f"{prefix}.norm.weight"])
        # Equation 24.
        found.append(cross_entropy(hidden, labels[m:]))
    return found


# -- the same of a run -------------------------------------------------------------------------------------------------


def micro_batch(number: int, lengths: tuple[int, ...], *, packed: bool, num_ids: int = VOCAB) -> MicroBatch:
    """Documents of random tokens below `num_ids`, a fifth of whose labels are masked; unpacked in rows of their own."""
    generator = torch.Generator().manual_seed(number)
    rows, width = (1, sum(lengths)) if packed else (len(lengths), max(lengths))
    ids, labels = torch.zeros(rows, width, dtype=torch.int64), torch.full((rows, width), IGNORE_INDEX)
    positions, start = torch.zeros_like(ids), 0
    for row, length in enumerate(lengths):
        place = (0, slice(start, start + length)) if packed else (row, slice(0, length))
        tokens = torch.randint(0, num_ids, (length,), generator=generator)
        targets = torch.cat([tokens[1:], torch.tensor([IGNORE_INDEX])])
        targets[torch.rand(length, generator=generator) < 0.2] = IGNORE_INDEX
        ids[place], labels[place], positions[place] = tokens, targets, torch.arange(length)
        start += length
    bounds = torch.tensor((0, *lengths)).cumsum(0).int()
    valid = int((labels != IGNORE_INDEX).sum())
    own = (bounds, lengths) if packed else (None, None)
    return MicroBatch(ids, labels, positions, torch.zeros_like(ids), *own, num_valid_tokens=valid)


def documents(batch: Batch, lengths: tuple[tuple[int, ...], ...]) -> Iterator[tuple[Tensor, Tensor]]:
    for micro, own in zip(batch.micro_batches, lengths, strict=True):
        if micro.cu_seqlens is not None:
            yield from zip(micro.input_ids[0].split(own), micro.labels[0].split(own), strict=True)
        else:
            for row, length in enumerate(own):
                yield micro.input_ids[row, :length], micro.labels[row, :length]


def differences(case: Case, num_later: int, packed: bool) -> dict[str, float]:
    """What a step in one process has beside the formulas: relative differences of numbers and gradients."""
    context = start_case(case)
    engine = CaseRun(case, context).trainer.engine
    batch = Batch([micro_batch(n, lengths, packed=packed) for n, lengths in enumerate(LENGTHS)], num_samples=3)
    weights = {shard_spec_of(p).name: p.detach().double().clone().requires_grad_() for p in engine.model.parameters()}
    parts = [losses_of(tokens, labels, weights, num_later) for tokens, labels in documents(batch, LENGTHS)]
    sums = [[sum(numbers) for numbers in zip(*column, strict=True)] for column in zip(*parts, strict=True)]
    means = [loss / max(number, 1) for loss, _, number in sums]
    total = means[0] + COEFFICIENT / num_later * sum(means[1:])
    expected = dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))

    passes = engine.forward_backward(batch)
    engine.optimizer.reduce_gradients()
    found = {}
    for name, _, pieces in engine.optimizer.sharded_gradients():
        gradient = torch.zeros_like(expected[name])
        for box, piece in pieces:
            gradient[box.global_slices()] = piece.double()
        found[name] = float((gradient - expected[name]).norm() / expected[name].norm())
    result = engine.optimizer_step(passes, 0.0)
    metrics = [result.loss, *(result.statistics[f"multi_token/loss/{m}"] for m in range(1, num_later + 1))]
    context.close()
    assert found.keys() == expected.keys()
    return found | {
        f"loss {m}": abs(float(value) / float(mean.detach()) - 1)
        for m, (value, mean) in enumerate(zip(metrics, means, strict=True))
    }


def case_of(num_later: int, model: str = "") -> Case:
    text = f"ranks=1 model:family=LLAMA2,fused=false,dtype=float64,multi_token={num_later}{model}"
    keys = {"loss.multi_token_loss_coeff": COEFFICIENT, "model.intermediate_size": 24}
    return Case(changed(Combination.parse(text).case().config, keys))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("num_later", "model"), [(1, ""), (2, ",tied=true"), (3, "")])
def test_losses_and_gradients_are_those_of_the_formulas(num_later: int, model: str, packed: bool) -> None:
    assert max(differences(case_of(num_later, model), num_later, packed).values()) < 1e-6


@pytest.mark.parametrize("packed", [True, False])
def test_the_accuracy_is_that_of_a_loop(packed: bool) -> None:
    """Two tokens occur, with large logits of opposite signs, so that many predictions are correct, also where the label
    of the model itself is masked."""
    num_ids, num_later = 2, 2
    case = case_of(num_later)
    context = start_case(case)
    engine = CaseRun(case, context).trainer.engine
    named = {shard_spec_of(p).name: p for p in engine.model.parameters()}
    with torch.no_grad():
        named["output.weight"][0] *= 10
        named["output.weight"][1] = -named["output.weight"][0]
    weights = {name: p.detach().double().clone() for name, p in named.items()}
    batch = Batch(
        [micro_batch(n, lengths, packed=packed, num_ids=num_ids) for n, lengths in enumerate(LENGTHS)], num_samples=3
    )
    parts = [losses_of(tokens, labels, weights, num_later) for tokens, labels in documents(batch, LENGTHS)]
    statistics = engine.optimizer_step(engine.forward_backward(batch), 0.0).statistics
    context.close()
    for m in range(1, num_later + 1):
        correct, number = (sum(part[m][i] for part in parts) for i in (1, 2))
        assert 5 < correct < number
        # The quotient in fp32.
        assert float(statistics[f"multi_token/acc/{m}"]) == pytest.approx(correct / number, rel=2**-23)


def one_too_late(micro: MicroBatch, offset: int) -> LaterTokens:
    return LaterTokens(later_tokens(micro, offset + 1).input_ids, later_tokens(micro, offset).labels)


def one_label_too_early(micro: MicroBatch, offset: int) -> LaterTokens:
    return LaterTokens(later_tokens(micro, offset).input_ids, micro.labels)


def across_documents(micro: MicroBatch, offset: int) -> LaterTokens:
    return LaterTokens(micro.input_ids.roll(-offset, 1), micro.labels.roll(-offset, 1))


@pytest.mark.parametrize("wrong", [one_too_late, one_label_too_early, across_documents])
def test_a_wrong_offset_is_found(wrong: Callable[..., LaterTokens], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_token_loss, "later_tokens", wrong)
    found = differences(case_of(2), 2, True)
    assert found["layers.2.eh_proj.weight"] > 1e-2 and found["loss 2"] > 1e-4


def test_later_tokens_stay_within_documents() -> None:
    micro = micro_batch(0, (1, 3, 2), packed=True)
    ids, labels = later_tokens(micro, 1)
    own = micro.input_ids[0].tolist()
    assert ids[0].tolist() == [0, own[2], own[3], 0, own[5], 0]
    expected = micro.labels[0, [2, 3, 5]].tolist()
    assert labels[0].tolist() == [IGNORE_INDEX, *expected[:2], IGNORE_INDEX, expected[2], IGNORE_INDEX]
    assert (later_tokens(micro, 3).labels == IGNORE_INDEX).all()
    assert (later_tokens(micro, 30).labels == IGNORE_INDEX).all()


def test_evaluation_leaves_them_out(ranks: Callable[[int], RankPool]) -> None:
    """Validation reports the loss of the next token alone."""
    assert ranks(1).run(evaluated, case_of(1)) == ranks(1).run(evaluated, case_of(0))


def evaluated(case: Case) -> float:
    """Loss sum of a micro-batch in evaluation."""

    class Sink:
        total = 0.0

        def update(self, token_losses: Tensor, *_: Any) -> None:
            self.total += float(token_losses.sum())

    context = start_case(case)
    sink = Sink()
    CaseRun(case, context).trainer.engine.evaluate(micro_batch(0, (7, 9), packed=True), sink)
    context.close()
    return sink.total
