"""Placeholders: the tokens that stand for the parts of a picture.

A picture is P consecutive placeholder tokens, one for each vector (feature) that a vision tower returns for it. Their
id is `image_token_id`, which may lie outside of the vocabulary. Knows neither pictures nor models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from internlm.utils.errors import DataError

IMAGE_FEATURES = "image_features"
"""Name of the indices of image features in `MicroBatch.extra`."""

NO_FEATURE = -1
"""Index of a token that is no placeholder."""


def image_feature_indices(input_ids: Tensor, image_token_id: int, tokens_per_image: int, num_images: int) -> Tensor:
    """Which image feature each token stands for, int64 `[B, S]`: n * P + p, or `NO_FEATURE` for text.

    Placeholders are counted row by row: the first P of all rows are picture 0, the next P are picture 1.

    Args:
        input_ids: int64 `[B, S]`, with placeholders.
        image_token_id: id of a placeholder.
        tokens_per_image: P.
        num_images: number N of pictures of the micro-batch.

    Raises:
        DataError: the number of placeholders is not N * P.
    """
    is_placeholder = input_ids == image_token_id
    numbers = is_placeholder.flatten().cumsum(0).view_as(input_ids) - 1
    found, expected = int(is_placeholder.sum()), num_images * tokens_per_image
    if found != expected:
        raise DataError(
            f"a micro-batch has {found} placeholders of pictures (token {image_token_id}), but its {num_images} "
            f"pictures are {num_images} x {tokens_per_image} = {expected}: no picture may be cut or left out"
        )
    return torch.where(is_placeholder, numbers, NO_FEATURE)
