"""A training sample as text: segments, document borders, and which tokens contribute loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from internlm.data.batch import IGNORE_INDEX, MicroBatch
from internlm.data.packing.image_placeholders import IMAGE_FEATURES

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def describe_sample(
    micro: MicroBatch, decode: Callable[[list[int]], str] | None, color: bool, image_names: Sequence[str] = ()
) -> list[str]:
    """Describe a micro-batch, one paragraph for each attention segment or row.

    Args:
        micro: packed or not.
        decode: text of ids; None prints the ids.
        color: dim the tokens that are never a label; False puts them into ⟦⟧.
        image_names: of the pictures, in order; each is printed in place of its placeholders.
    """
    features = micro.extra.get(IMAGE_FEATURES)
    pictures = np.full(micro.input_ids.shape, -1) if features is None else _pictures(features.numpy(), len(image_names))
    if micro.lengths is None:
        rows = list(zip(micro.input_ids.tolist(), micro.labels.tolist(), pictures.tolist(), strict=True))
        name = "row"
    else:
        cuts = np.cumsum(micro.lengths)[:-1]
        rows = [
            (ids.tolist(), labels.tolist(), images.tolist())
            for ids, labels, images in zip(
                np.split(micro.input_ids[0].numpy(), cuts),
                np.split(micro.labels[0].numpy(), cuts),
                np.split(pictures[0], cuts),
                strict=True,
            )
        ]
        name = "segment"
    lines = []
    for number, (ids, labels, images) in enumerate(rows):
        # The first token of a segment is no label in it; what it was in the document is not known here.
        learned = [labels[0] != IGNORE_INDEX, *(label != IGNORE_INDEX for label in labels[:-1])]
        num_labels = sum(label != IGNORE_INDEX for label in labels)
        lines.append(f"--- {name} {number}: {len(ids):,} tokens, {num_labels:,} labels " + "-" * 20)
        lines.append(_render(ids, list(zip(learned, images, strict=True)), decode, color, image_names))
    return lines


def _pictures(features: NDArray[np.int64], num_images: int) -> NDArray[np.int64]:
    """The picture that each token belongs to, of the same shape; -1 for text."""
    per_image = max(1, int(features.max() + 1) // max(1, num_images))
    return np.where(features < 0, -1, features // per_image)


def _render(
    ids: Sequence[int],
    kinds: Sequence[tuple[bool, int]],
    decode: Callable[[list[int]], str] | None,
    color: bool,
    image_names: Sequence[str],
) -> str:
    """The ids as text, in runs of tokens of a kind: (whether they have loss, their picture or -1)."""
    opening, closing = (_DIM, _PLAIN) if color else ("⟦", "⟧")
    starts = [0, *(index for index in range(1, len(ids)) if kinds[index] != kinds[index - 1]), len(ids)]
    text = ""
    for start, stop in itertools.pairwise(starts):
        run = list(ids[start:stop])
        has_loss, picture = kinds[start]
        part = decode(run) if decode is not None else " ".join(map(str, run)) + " "
        if picture >= 0:
            part = f"[picture {image_names[picture]}, {len(run):,} tokens]"
        text += part if has_loss else f"{opening}{part}{closing}"
    return text
