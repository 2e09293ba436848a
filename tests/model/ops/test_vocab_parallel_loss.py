"""The loss over a vocabulary in parts against the loss over the whole: ranks are threads of reductions by hand."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.model.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy


class Ranks:
    """In-place reductions between threads."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size

    def reduce(self, rank: int, tensor: Tensor, how: str) -> Tensor:
        self.slots[rank] = tensor.clone()
        self.barrier.wait()
        stacked = torch.stack(self.slots)
        result = {"sum": stacked.sum(0), "max": stacked.amax(0), "min": stacked.amin(0)}[how]
        self.barrier.wait()
        return tensor.copy_(result)


class Part:
    """The classes of one thread."""

    def __init__(self, ranks: Ranks, rank: int, block: int, total: int) -> None:
        self.ranks, self.rank, self.total = ranks, rank, total
        self.start = min(rank * block, total)
        self.size = min(block, total - self.start)

    def sum(self, tensor: Tensor) -> Tensor:
        return self.ranks.reduce(self.rank, tensor, "sum")

    def max(self, tensor: Tensor) -> Tensor:
        return self.ranks.reduce(self.rank, tensor, "max")

    def min(self, tensor: Tensor) -> Tensor:
        return self.ranks.reduce(self.rank, tensor, "min")


@pytest.mark.parametrize("total", [12, 13, 5])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss_coeff": 0.01, "label_smoothing": 0.2}])
def test_parts_give_the_loss_and_gradients_of_the_whole(total: int, options: dict[str, float]) -> None:
    # 5 classes over 4 ranks in blocks of 2: the last rank has padding only.
    size, hidden_size, num_tokens = 4, 6, 11
    generator = torch.Generator().manual_seed(total)
    hidden = torch.randn(num_tokens, hidden_size, dtype=torch.float64, generator=generator)
    weight = torch.randn(total, hidden_size, dtype=torch.float64, generator=generator)
    weight[total - 1] = weight[0]  # equal scores on the first and the last rank: the first class counts
    labels = torch.randint(0, total, (num_tokens,), generator=generator)
    labels[3] = IGNORE_INDEX
    labels[:2] = torch.tensor([0, total - 1])
    whole_hidden, whole_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = linear_cross_entropy(whole_hidden, whole_weight, labels, with_accuracy=True, chunk_tokens=4, **options)  # type: ignore[arg-type]
    expected.loss_sum.backward()

    block = -(-total // size)
    padded = torch.zeros(block * size, hidden_size, dtype=torch.float64)
    padded[:total] = weight
    ranks = Ranks(size)
    results: list[Any] = [None] * size

    def work(rank: int) -> None:
        own = padded[rank * block : (rank + 1) * block].clone().requires_grad_()
        mine = hidden.clone().requires_grad_()
        output = linear_cross_entropy(
            mine,
            own,
            labels,
            with_accuracy=True,
            chunk_tokens=4,
            vocab=Part(ranks, rank, block, total),
            **options,  # type: ignore[arg-type]
        )
        output.loss_sum.backward()
        results[rank] = output, mine.grad, own.grad

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for output, _, _ in results:
        torch.testing.assert_close(output.loss_sum, expected.loss_sum)
        torch.testing.assert_close(output.token_losses, expected.token_losses)
        assert torch.equal(output.correct, expected.correct)
    torch.testing.assert_close(sum(grad for _, grad, _ in results), whole_hidden.grad)
    grad_weight = torch.cat([grad for _, _, grad in results])
    torch.testing.assert_close(grad_weight[:total], whole_weight.grad)
    assert not grad_weight[total:].any()
