"""Templates whose marks are inside macros and assigned blocks, that read the clock, or lack a generation prompt."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from helpers.chat_templates import CHATML, MARKED, save_chat_tokenizer
from transformers import AutoTokenizer

from internlm.data.conversations.chat_template import load_chat_template
from internlm.data.conversations.encoder import ConversationEncoder, ConversationOptions
from internlm.data.conversations.template_source import split_marks
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.utils.errors import DataError

MESSAGES = [
    {"role": "user", "content": "What is the sum?"},
    {"role": "assistant", "content": "The answer is five."},
    {"role": "user", "content": "The answer is five."},
    {"role": "assistant", "content": "It is two, ünï."},
]
ANSWER = """\
{{- '<|im_start|>assistant\\n' }}{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
"""
OTHERS = "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
TURNS = f"""\
{{%- for message in messages %}}{{%- if message['role'] == 'assistant' %}}ANSWER{{%- else %}}{OTHERS}{{%- endif %}}
{{%- endfor %}}"""
MACRO = f"{{%- macro answer(message) %}}{ANSWER}{{%- endmacro %}}" + TURNS.replace("ANSWER", "{{- answer(message) }}")
ASSIGNED = TURNS.replace("ANSWER", f"{{%- set part %}}{ANSWER}{{%- endset %}}{{{{- part }}}}")
FILTERED = TURNS.replace("ANSWER", f"{{%- set part %}}{ANSWER}{{%- endset %}}{{{{- part | upper }}}}")
TEXT = (
    "<|im_start|>user\nWhat is the sum?<|im_end|>\n<|im_start|>assistant\n[The answer is five.<|im_end|>]\n"
    "<|im_start|>user\nThe answer is five.<|im_end|>\n<|im_start|>assistant\n[It is two, ünï.<|im_end|>]\n"
)


def build(folder: Path, **options: str) -> ConversationEncoder:
    return ConversationEncoder(load_tokenizer(folder), load_chat_template(folder), ConversationOptions(**options))


def text_of(folder: Path, **options: str) -> str:
    """The text of the tokens, runs with loss in brackets; decoded by transformers."""
    found = build(folder, **options).encode({"messages": MESSAGES}, "row")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    runs: list[tuple[list[int], bool]] = []
    for token, learned in zip(found.ids, found.loss_mask, strict=True):
        if not runs or runs[-1][1] != learned:
            runs.append(([], learned))
        runs[-1][0].append(token)
    texts = [(tokenizer.decode(ids, clean_up_tokenization_spaces=False), learned) for ids, learned in runs]
    return "".join(f"[{text}]" if learned else text for text, learned in texts)


@pytest.mark.parametrize("source", [MARKED, MACRO, ASSIGNED], ids=["emitted", "macro", "assigned"])
def test_marks_are_found_wherever_the_template_has_them(tmp_path: Path, source: str) -> None:
    folder = save_chat_tokenizer(tmp_path / "t", source)
    assert text_of(folder) == TEXT
    head, _, tail = TEXT.partition("[The answer is five.<|im_end|>]")
    assert text_of(folder, learn="last") == f"{head}The answer is five.<|im_end|>{tail}"


@pytest.mark.parametrize("before", ["", "\n", "\n\n  ", "    ", "{# a comment #}\n"])
@pytest.mark.parametrize("source", [MARKED, MACRO, "{{- strftime_now('') }}" + MARKED], ids=["plain", "macro", "clock"])
def test_macros_in_front_change_no_white_space(tmp_path: Path, before: str, source: str) -> None:
    folder = save_chat_tokenizer(tmp_path / "t", before + source.replace("{%-", "{%", 1))
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    assert build(folder).encode({"messages": MESSAGES}, "row").ids == theirs


def test_marked_text_that_is_changed_later_is_refused(tmp_path: Path) -> None:
    folder = save_chat_tokenizer(tmp_path / "t", FILTERED)
    with pytest.raises(DataError, match=r"^f\.jsonl: record 7: .* changes the text that .* marks .*'prefix'"):
        build(folder).encode({"messages": MESSAGES}, "f.jsonl: record 7")


def test_the_day_of_the_run_changes_no_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = "{{- '<|im_start|>system\\n' + strftime_now('%d %b %Y, %-m/%-d %A 100%%') + '<|im_end|>\\n' }}"
    with caplog.at_level("INFO", logger="internlm"):
        text = text_of(save_chat_tokenizer(tmp_path / "t", clock + MARKED))
    assert text == "<|im_start|>system\n26 Jul 2024, 7/26 Friday 100%<|im_end|>\n" + TEXT
    assert "writes today's date: it is 26 July 2024 in every row" in caplog.text


def test_rows_that_were_cached_with_other_marks_are_not_used(tmp_path: Path) -> None:
    """The fingerprint of before for a template without marks, and another one for the others."""
    before = {}
    for name, source in (("plain", CHATML), ("marks", MARKED), ("clock", "{{- strftime_now('%Y') }}" + CHATML)):
        template = load_chat_template(save_chat_tokenizer(tmp_path / name, source))
        content = repr((source, source, sorted(template.special_tokens.items())))
        before[name] = template.fingerprint == hashlib.sha256(content.encode()).hexdigest()[:16]
    assert before == {"plain": True, "marks": False, "clock": False}


def test_errors_have_the_lines_of_the_template_itself(tmp_path: Path) -> None:
    folder = save_chat_tokenizer(tmp_path / "t", "{{- strftime_now('%Y') }}\n{% for %}")
    with pytest.raises(DataError, match=r"row: the chat template of .*, line 2 refuses the row"):
        build(folder).encode({"messages": MESSAGES}, "row")


def test_a_header_without_a_generation_prompt_is_refused(tmp_path: Path) -> None:
    prompt = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    assert CHATML.endswith(prompt)
    folder = save_chat_tokenizer(tmp_path / "t", CHATML.removesuffix(prompt))
    with pytest.raises(DataError, match=r"row: message 1 .* no generation prompt .*assistant\\n' before"):
        build(folder).encode({"messages": MESSAGES}, "row")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab", ("ab", [])),
        ("a\x00<answer>\x00b\x00</answer>\x00c", ("abc", [(1, 2)])),
        ("\x00<answer>\x00a\x00<answer>\x00b\x00</answer>\x00c\x00</answer>\x00", ("abc", [(0, 3)])),
        ("a\x00</answer>\x00", None),
        ("a\x00<answer>\x00", None),
    ],
)
def test_marks_are_separated(text: str, expected: object) -> None:
    assert split_marks(text) == expected
