"""Placeholders are numbered in the order of their pictures."""

from __future__ import annotations

import pytest
import torch

from internlm.data.packing.image_placeholders import image_feature_indices
from internlm.utils.errors import DataError


@pytest.mark.parametrize("image_token_id", [3, 200000])
def test_placeholders_are_numbered_over_all_rows(image_token_id: int) -> None:
    i = image_token_id
    ids = torch.tensor([[5, i, i, 1, i, i], [7, 8, i, i, 9, 0]])
    found = image_feature_indices(ids, image_token_id, tokens_per_image=2, num_images=3)
    assert found.tolist() == [[-1, 0, 1, -1, 2, 3], [-1, -1, 4, 5, -1, -1]]


def test_rows_without_pictures_have_no_index() -> None:
    assert image_feature_indices(torch.tensor([[5, 6]]), 3, 2, 0).tolist() == [[-1, -1]]


@pytest.mark.parametrize(("num_images", "numbers"), [(0, "0 pictures are 0 x 2 = 0"), (2, "2 pictures are 2 x 2 = 4")])
def test_a_wrong_number_of_placeholders_is_named(num_images: int, numbers: str) -> None:
    with pytest.raises(DataError, match=rf"3 placeholders of pictures \(token 9\), but its {numbers}"):
        image_feature_indices(torch.tensor([[9, 9, 1, 9]]), 9, 2, num_images)
