"""Loss and accuracy by data type, accumulated on the device over micro-batches and data ranks.

Owns the sums and the names of the metrics. Knows neither how token losses are computed nor process groups: the caller
passes tensors, and a function that sums a tensor over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from internlm.core.position_buckets import name_of
from internlm.data.batch import IGNORE_INDEX
from internlm.data.documents.label_bytes import LabelBytes
from internlm.utils.errors import DataError

Reduce = Callable[[Tensor], Tensor]
"""Returns the sum of a tensor over all ranks that compute different tokens; may work in place."""


class TokenSums:
    """Sum of losses, number of correct tokens and number of valid tokens by data type, on the device.

    No method waits for the device.

    Args:
        num_types: number of data types.
        device: that of the tensors passed to `update`.

    Attributes:
        values: float64 `[num_types, 3]`: sum of losses, number of correct tokens, number of valid tokens.
    """

    def __init__(self, num_types: int, device: torch.device | str = "cpu") -> None:
        # `index_add_` on a GPU adds in any order. In float64 counts stay exact, and losses repeat to about 1e-16.
        self.values = torch.zeros((num_types, 3), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, token_losses: Tensor, correct: Tensor, labels: Tensor, type_ids: Tensor) -> None:
        """Add tokens. The arguments may have any shape, with the same number of elements.

        Args:
            token_losses: float, cross entropy of each token in nats; ignored where the label is `IGNORE_INDEX`.
            correct: bool, whether the most likely token is the label.
            labels: int64; tokens labelled `IGNORE_INDEX` do not count.
            type_ids: int64 in `[0, num_types)`.
        """
        valid = labels.reshape(-1) != IGNORE_INDEX
        # `where` instead of a product: a masked token may have a loss of NaN, and NaN * 0 is NaN.
        losses = torch.where(valid, token_losses.reshape(-1).double(), 0.0)
        rows = torch.stack((losses, (correct.reshape(-1).bool() & valid).double(), valid.double()), dim=1)
        self.values.index_add_(0, type_ids.reshape(-1), rows)

    def reset(self) -> None:
        """Set all sums to zero."""
        self.values.zero_()


class TypeMetrics:
    """Metrics of a training step by data type.

    Args:
        type_names: the name of each type id of `MicroBatch.type_ids`.
        device: that of the tensors passed to `update`.
    """

    def __init__(self, type_names: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.type_names = tuple(type_names)
        self.sums = TokenSums(len(self.type_names), device)

    def update(self, token_losses: Tensor, correct: Tensor, labels: Tensor, type_ids: Tensor) -> None:
        """Add the tokens of a micro-batch; see `TokenSums.update`."""
        self.sums.update(token_losses, correct, labels, type_ids)

    def result(self, reduce: Reduce) -> dict[str, Tensor]:
        """Metrics of all micro-batches since the last call, over all ranks; collective.

        Args:
            reduce: sums a tensor over the ranks.

        Returns:
            Scalar float64 tensors: "acc", "perplexity" and "loss_from_metric" over all tokens, and "loss/<type>",
            "acc/<type>" and "tokens/<type>". Loss and accuracy of a type without valid tokens are NaN.
        """
        by_type = reduce(self.sums.values.clone())
        self.sums.reset()
        loss, correct, valid = by_type.sum(dim=0).unbind()
        mean = loss / valid
        result = {"acc": correct / valid, "perplexity": mean.exp(), "loss_from_metric": mean}
        for name, (type_loss, type_correct, type_valid) in zip(self.type_names, by_type, strict=True):
            result[f"loss/{name}"] = type_loss / type_valid
            result[f"acc/{name}"] = type_correct / type_valid
            result[f"tokens/{name}"] = type_valid
        return result


def evaluation_results(
    set_name: str,
    sums: TokenSums,
    reduce: Reduce,
    label_bytes: LabelBytes | None = None,
    *,
    by_position: bool = False,
) -> dict[str, float]:
    """Results of one valid set over all its tokens; collective. Waits for the device.

    Args:
        set_name: the name of the set in the results.
        sums: sums over this rank's tokens of the set.
        reduce: sums a tensor over the ranks.
        label_bytes: of the set; None if they are not known.
        by_position: the types of the tokens are buckets of `position_buckets`, each of which gets results of its own.

    Returns:
        `val/<set>_loss` (mean cross entropy per token, nats), `val/<set>_acc` and `val/<set>_plex` (exp of the loss);
        with `label_bytes` also `val/<set>_bpb` (sum of the cross entropy in bits by bytes of text);
        with `by_position` also `val/<set>_loss_by_position/<positions>` and `val/<set>_tokens_by_position/<positions>`
        of each bucket that has a label.

    Raises:
        DataError: no token of the set has a label.
    """
    by_type = reduce(sums.values.clone()).tolist()
    loss, correct, valid = (sum(column) for column in zip(*by_type, strict=True))
    if valid == 0:
        raise DataError(
            f"valid set '{set_name}': no token contributes loss; is its folder empty, or are all its tokens negative "
            "(masked)? Correct it or remove it from valid_folder"
        )
    mean = loss / valid
    results = {
        f"val/{set_name}_loss": mean,
        f"val/{set_name}_acc": correct / valid,
        f"val/{set_name}_plex": _exp(mean),
    }
    if label_bytes is not None:
        if label_bytes.labels != valid:
            raise DataError(
                f"valid set '{set_name}': {int(valid)} labels were evaluated, but {label_bytes.labels} were counted at "
                "the start of the run: its files have changed"
            )
        results[f"val/{set_name}_bpb"] = loss / math.log(2) / label_bytes.bytes
    if by_position:
        for bucket, (bucket_loss, _, bucket_valid) in enumerate(by_type):
            if bucket_valid > 0:
                results[f"val/{set_name}_loss_by_position/{name_of(bucket)}"] = bucket_loss / bucket_valid
                results[f"val/{set_name}_tokens_by_position/{name_of(bucket)}"] = bucket_valid
    return results


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
