"""A training sample as text: segments, document borders, and which tokens contribute loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from internlm.data.batch import IGNORE_INDEX, MicroBatch

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def describe_sample(micro: MicroBatch, decode: Callable[[list[int]], str] | None, color: bool) -> list[str]:
    """Describe a micro-batch, one paragraph for each attention segment or row.

    Args:
        micro: packed or not.
        decode: text of ids; None prints the ids.
        color: dim the tokens that are never a label; False puts them into ⟦⟧.
    """
    if micro.lengths is None:
        rows = list(zip(micro.input_ids.tolist(), micro.labels.tolist(), strict=True))
        name = "row"
    else:
        cuts = np.cumsum(micro.lengths)[:-1]
        rows = [
            (ids.tolist(), labels.tolist())
            for ids, labels in zip(
                np.split(micro.input_ids[0].numpy(), cuts), np.split(micro.labels[0].numpy(), cuts), strict=True
            )
        ]
        name = "segment"
    lines = []
    for number, (ids, labels) in enumerate(rows):
        # The first token of a segment is no label in it; what it was in the document is not known here.
        learned = [labels[0] != IGNORE_INDEX, *(label != IGNORE_INDEX for label in labels[:-1])]
        num_labels = sum(label != IGNORE_INDEX for label in labels)
        lines.append(f"--- {name} {number}: {len(ids):,} tokens, {num_labels:,} labels " + "-" * 20)
        lines.append(_render(ids, learned, decode, color))
    return lines


def _render(ids: Sequence[int], learned: Sequence[bool], decode: Callable[[list[int]], str] | None, color: bool) -> str:
    """The ids as text, in runs of tokens with and without loss."""
    opening, closing = (_DIM, _PLAIN) if color else ("⟦", "⟧")
    starts = [0, *(index for index in range(1, len(ids)) if learned[index] != learned[index - 1]), len(ids)]
    text = ""
    for start, stop in itertools.pairwise(starts):
        run = list(ids[start:stop])
        part = decode(run) if decode is not None else " ".join(map(str, run)) + " "
        text += part if learned[start] else f"{opening}{part}{closing}"
    return text
