"""Stop texts in the text of tokens that come one by one."""

from __future__ import annotations

from typing import Any

import pytest

from internlm.apis.engine import Prompt, Text
from internlm.apis.sampling import Sampling
from internlm.serve.readable_text import ReadableText


class Letters:
    """A token is the number of a letter."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize("min_new_tokens", [0, 1, 3])
def test_a_stop_text_counts_from_the_first_token_behind_the_least_number(min_new_tokens: int) -> None:
    letters: Any = Letters()
    text = Text(Prompt([*b"!"]), Sampling(max_new_tokens=9, min_new_tokens=min_new_tokens, eos_ids=(0,)))
    reader = ReadableText(text, letters, ["!"])
    for count in range(1, min_new_tokens + 2):
        assert not reader.is_stopped
        text.new_ids.append(ord("!"))
        assert reader.read() == ("!" if count <= min_new_tokens else "")
    assert reader.is_stopped and reader.finish_reason == "stop" and reader.shown == "!" * min_new_tokens
