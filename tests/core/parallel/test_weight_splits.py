"""Arithmetic of splits: errors name what the caller passed, not keys of a config."""

from __future__ import annotations

import pytest

from internlm.core.parallel.weight_splits import even_part, kv_replicas
from internlm.model.roles import HeadShape
from internlm.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("heads", "ranks", "message"),
    [
        (HeadShape(6, 2, 8), 4, "num_heads = 6 is not divisible by tensor = 4"),
        (HeadShape(12, 6, 8), 4, "num_kv_heads = 6 and tensor = 4: one must divide the other"),
    ],
)
def test_heads_that_cannot_be_split_are_refused(heads: HeadShape, ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        kv_replicas(heads, ranks)
    assert "model." not in str(caught.value) and "parallel." not in str(caught.value)


def test_a_width_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="the width = 7 is not divisible by tensor = 2"):
        even_part(7, 2, 0, "the width")
    assert even_part(8, 2, 1, "the width") == (4, 4)
