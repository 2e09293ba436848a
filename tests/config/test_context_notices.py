"""Notices on context ranks."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.configs import small_config

from internlm.config.notices import find_notices
from internlm.verify.choices import LATENT_KEYS

LATENT = {"model_type": "DEEPSEEK_V2", **LATENT_KEYS}
ISP = {"parallel.tensor": {"size": 2, "mode": "isp"}}
TWO = {"parallel.sequence_2D": {"enable": True, "head_size": 1, "context_size": 4, "window_size": 2}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"parallel.context.size": 2}, None),
        ({"parallel.context": {"size": 2, "exchange": "ring"}}, None),
        ({"parallel.context.size": 2, **LATENT}, None),
        ({"parallel.context": {"size": 2, "exchange": "direct"}, **LATENT}, None),
        (
            {"parallel.context": {"size": 2, "exchange": "ring"}, **LATENT},
            "effect: parallel.context.exchange = 'ring' (la",
        ),
        (
            {"parallel.context": {"size": 4, "window_size": 2}, **LATENT},
            "effect: parallel.context.window_size = 2 (lat",
        ),
        ({"parallel.tensor": {"size": 4, "mode": "isp"}, **TWO, **LATENT}, "parallel.sequence_2D.window_size = 2 (la"),
        ({"parallel.context.size": 2, **ISP, **LATENT}, "with 2 sequence ranks of isp and 2 context ranks: keys and"),
        ({**ISP, **LATENT}, None),
    ],
    ids=str,
)
def test_what_latent_attention_sends(changes: dict[str, Any], expected: str | None) -> None:
    found = [line for line in find_notices(small_config(changes), lambda path: None, 4) if "latent" in line]
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]


def test_padding_of_each_sample_is_named() -> None:
    """Two rows of 16 tokens on 2 x 3 ranks: a sample of 32 tokens grows to 36."""
    changes = {"parallel.context.size": 3, "parallel.tensor.size": 2, "data.seq_len": 16, "data.micro_bsz": 2}
    (line,) = [line for line in find_notices(small_config(changes), lambda path: None, 6) if "filled up" in line]
    assert line.startswith("each sample of 32 tokens (data.micro_bsz * data.seq_len) is filled up with 4 of padding")
    even = small_config({**changes, "parallel.context.size": 4})
    assert not [line for line in find_notices(even, lambda path: None, 8) if "filled up" in line]
