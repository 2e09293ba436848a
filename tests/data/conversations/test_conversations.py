"""Conversations: ids of transformers' own rendering, loss on what the assistant says and on nothing else."""

import copy
import json

import pytest
from helpers.chat_templates import CHATML, LLAMA3, MARKED, REASONING, STRIPPING, save_chat_tokenizer
from transformers import AutoTokenizer

from internlm.data.conversations.chat_template import load_chat_template
from internlm.data.conversations.encoder import ConversationEncoder, ConversationOptions, load_template_for
from internlm.data.conversations.row_forms import FORMS, Completion, detect_form, read_row
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.utils.errors import DataError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the sum of two and three?"},
    {"role": "assistant", "content": "The answer is five."},
    {"role": "user", "content": "And of four and four?  "},
    {"role": "assistant", "content": "It is eight,\n\nnot nine: ünï 数."},
]
ANSWERS = [MESSAGES[2]["content"], MESSAGES[4]["content"]]
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "marked": MARKED, "stripping": STRIPPING, "reasoning": REASONING}
# What follows an answer and is learned with it, and what precedes it.
AROUND = {
    "chatml": ("", "<|im_end|>\n"),
    "llama3": ("", "<|eot_id|>"),
    "marked": ("", "<|im_end|>"),
    "stripping": (" ", " <|endoftext|>"),
    "reasoning": ("", "<|im_end|>\n"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    return {name: save_chat_tokenizer(root / name, source) for name, source in TEMPLATES.items()}


def build(folder, **options):
    template = load_chat_template(folder)
    return ConversationEncoder(load_tokenizer(folder), template, ConversationOptions(**options))


def learned(folder, found):
    """The texts of the runs of tokens with loss."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    runs, current = [], []
    for token, loss in [*zip(found.ids, found.loss_mask, strict=True), (0, False)]:
        if loss:
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current, clean_up_tokenization_spaces=False))
            current = []
    return runs


def rendered(folder, messages, **options):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("learn", ["all", "last"])
def test_ids_are_those_of_the_library_and_only_answers_have_loss(folders, name, learn):
    before = copy.deepcopy(MESSAGES)
    found = build(folders[name], learn=learn).encode({"messages": MESSAGES}, "row")
    assert before == MESSAGES
    assert found.ids == rendered(folders[name], MESSAGES)
    start, end = AROUND[name]
    assert learned(folders[name], found) == [
        f"{start}{answer}{end}" for answer in (ANSWERS if learn == "all" else ANSWERS[1:])
    ]
    assert found.num_labels == sum(found.loss_mask) and not found.loss_mask[0]


def test_marks_give_the_mask_of_the_library_and_prefixes_add_what_the_template_appends(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["marked"])
    theirs = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    for method in ("auto", "marks"):
        ours = build(folders["marked"], mask=method).encode({"messages": MESSAGES}, "row")
        assert ours.ids == theirs["input_ids"] and list(map(int, ours.loss_mask)) == theirs["assistant_masks"]
    by_prefix = build(folders["marked"], mask="prefix").encode({"messages": MESSAGES}, "row")
    assert learned(folders["marked"], by_prefix) == [f"{answer}<|im_end|>\n" for answer in ANSWERS]


def test_a_template_that_changes_earlier_answers_is_refused_except_for_the_last(folders):
    messages = copy.deepcopy(MESSAGES)
    messages[2]["content"] = "<think>two and three</think>\n\nThe answer is five."
    messages[4]["content"] = "<think>four and four</think>\n\nIt is eight."
    with pytest.raises(DataError, match=r"^f\.jsonl: record 7: message 2 cannot be separated.*'<think>.*'last'"):
        build(folders["reasoning"]).encode({"messages": messages}, "f.jsonl: record 7")
    found = build(folders["reasoning"], learn="last").encode({"messages": messages}, "row")
    assert found.ids == rendered(folders["reasoning"], messages)
    assert learned(folders["reasoning"], found) == ["<think>four and four</think>\n\nIt is eight.<|im_end|>\n"]


def test_a_header_that_is_not_the_generation_prompt_is_refused(tmp_path):
    source = CHATML.replace("{{- '<|im_start|>assistant\\n' }}{%- endif %}", "{{- '<|x|>' }}{%- endif %}")
    assert source != CHATML
    folder = save_chat_tokenizer(tmp_path / "t", source)
    with pytest.raises(DataError, match=r"row: message 2 cannot be separated exactly: .*up to its generation prompt"):
        build(folder).encode({"messages": MESSAGES}, "row")


def test_a_token_across_the_border_is_refused(folders):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\n\n\nfive"}]
    with pytest.raises(DataError, match=r"row: a token crosses the border of an answer, between .*assistant.n' and"):
        build(folders["chatml"]).encode({"messages": messages}, "row")
    assert learned(folders["llama3"], build(folders["llama3"]).encode({"messages": messages}, "row")) == [
        "five<|eot_id|>"  # this template strips
    ]


def test_tools_and_calls_are_rendered_as_the_library_does(folders):
    schema = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    messages = [
        {"role": "user", "content": "What is the sum?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "The answer is five."},
    ]
    # The header of a call has no line end of its own here, so the generation prompt is its prefix only with text.
    expected = rendered(folders["chatml"], messages, tools=[schema])
    as_text = copy.deepcopy(messages)
    as_text[1] |= {"content": None}
    as_text[1]["tool_calls"][0]["function"]["arguments"] = json.dumps({"a": 2, "b": 3})
    sharegpt = [
        {"from": "human", "value": "What is the sum?"},
        {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 2, "b": 3}})},
        {"from": "observation", "value": "5"},
        {"from": "gpt", "value": "The answer is five."},
    ]
    rows = [
        {"messages": messages, "tools": [schema]},
        {"messages": as_text, "tools": json.dumps([schema["function"]])},
        {"conversations": sharegpt, "tools": json.dumps([schema])},
    ]
    for row in rows:
        found = build(folders["chatml"]).encode(row, "row")
        assert found.ids == expected
        assert learned(folders["chatml"], found) == [
            '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>\n',
            "The answer is five.<|im_end|>\n",
        ]
    with pytest.raises(DataError, match=r"row has tools, which the chat template of .*llama3 does not render"):
        build(folders["llama3"]).encode(rows[0], "row")
    with pytest.raises(DataError, match=r"row has tool_calls, which"):
        build(folders["llama3"]).encode({"messages": messages}, "row")


def test_every_form_of_one_conversation_gives_the_same_tokens(folders):
    question, answer = "What is the sum?\nof two and three", "The answer is five."
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rows = {
        "messages": {"messages": turns},
        "sharegpt": {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        "alpaca": {"instruction": "What is the sum?", "input": "of two and three", "output": answer},
        "prompt_response": {"prompt": question, "response": answer},
        "prompt_completion": {"prompt": turns[:1], "completion": turns[1:]},
    }
    assert set(rows) == set(FORMS)
    system = [{"role": "system", "content": "Be brief."}]
    for form, row in rows.items():
        assert detect_form(row, "row") == form
        for options in ({}, {"form": form}):
            found = build(folders["chatml"], **options).encode(row | {"id": 1, "empty": None}, "row")
            assert found.ids == rendered(folders["chatml"], turns), form
            assert learned(folders["chatml"], found) == [f"{answer}<|im_end|>\n"]
        if form != "messages":
            found = build(folders["chatml"]).encode(row | {"system": "Be brief."}, "row")
            assert found.ids == rendered(folders["chatml"], system + turns)


def test_history_prompts_weights_and_parts(folders):
    encoder = build(folders["chatml"])
    row = {"instruction": "And of four?", "output": "eight", "history": [["two and three?", "five"]]}
    assert learned(folders["chatml"], encoder.encode(row, "row")) == ["five<|im_end|>\n", "eight<|im_end|>\n"]
    row = {"prompt": MESSAGES[:4], "completion": MESSAGES[4:]}
    assert learned(folders["chatml"], encoder.encode(row, "row")) == [f"{ANSWERS[1]}<|im_end|>\n"]
    weighted = copy.deepcopy(MESSAGES)
    weighted[4]["weight"] = 0
    weighted[1]["content"] = [{"type": "text", "text": text} for text in ("What is ", "the sum of two and three?")]
    for name in ("chatml", "marked"):
        found = build(folders[name]).encode({"messages": weighted}, "row")
        assert found.ids == rendered(folders[name], MESSAGES)
        assert [text.split("<|im_end|>")[0] for text in learned(folders[name], found)] == ANSWERS[:1]


def test_completions_have_no_template(folders, tmp_path):
    folder = save_chat_tokenizer(tmp_path / "plain", None)
    options = ConversationOptions(form="prompt_completion")
    encoder = ConversationEncoder(load_tokenizer(folder), load_template_for(options, folder), options)
    found = encoder.encode({"prompt": "two and three?", "completion": " five"}, "row")
    assert learned(folder, found) == [" five<|endoftext|>"]
    assert AutoTokenizer.from_pretrained(folder).decode(found.ids) == "two and three? five<|endoftext|>"
    assert encoder.encode({"prompt": "two", "completion": ""}, "row").num_labels == 0
    assert read_row({"prompt": "a", "completion": "b"}, None, "row") == Completion("a", "b")
    with pytest.raises(DataError, match="row is a conversation, which needs a chat template"):
        encoder.encode({"prompt": MESSAGES[1:2], "completion": MESSAGES[2:3]}, "row")


def test_without_an_answer_nothing_is_learned(folders):
    empty = [*MESSAGES[:4], {"role": "assistant", "content": " "}]
    for name in ("chatml", "marked"):
        assert build(folders[name]).encode({"messages": MESSAGES[:2]}, "row").num_labels == 0
        assert build(folders[name], learn="last").encode({"messages": empty}, "row").num_labels == 0
        found = build(folders[name]).encode({"messages": empty}, "row")
        assert [text.split("<|im_end|>")[0] for text in learned(folders[name], found)] == ANSWERS[:1]


def test_a_tokenizer_without_a_template_is_refused_with_the_fix(folders, tmp_path):
    folder = save_chat_tokenizer(tmp_path / "plain", None)
    with pytest.raises(DataError, match=r"plain: the tokenizer has no chat template: put a chat_template.jinja .*FILE"):
        load_template_for(ConversationOptions(), folder)
    (tmp_path / "own.jinja").write_text(LLAMA3)
    template = load_template_for(ConversationOptions(chat_template=str(tmp_path / "own.jinja")), folder)
    encoder = ConversationEncoder(load_tokenizer(folder), template, ConversationOptions())
    assert encoder.encode({"messages": MESSAGES}, "row").ids == rendered(folders["llama3"], MESSAGES)
    with pytest.raises(DataError, match=r"none\.jinja: the chat template cannot be read"):
        load_template_for(ConversationOptions(chat_template=str(tmp_path / "none.jinja")), folder)
    named = save_chat_tokenizer(tmp_path / "named", {"default": LLAMA3, "tool_use": CHATML})
    assert load_chat_template(named).tools_source == CHATML
    assert load_chat_template(named).fingerprint != load_chat_template(folders["llama3"]).fingerprint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (5, r"^f: 3 is int, not an object"),
        ({"text": "a"}, r"^f: 3 is not a conversation: its columns are \['text'\]"),
        (
            {"messages": MESSAGES, "prompt": "a", "response": "b"},
            r"fits the forms messages, prompt_response .*--conversations m",
        ),
        ({"messages": []}, r"'messages': expected a list of messages, not an empty list"),
        ({"messages": "abc"}, r"'messages' is text, but not JSON"),
        ({"messages": [5]}, r"'messages', message 0: expected an object with 'role' and 'content', not int"),
        ({"messages": [{"content": "a"}]}, r"message 0: no 'role' .* its keys are \['content'\]"),
        ({"messages": [{"role": "user"}]}, r"message 0: neither 'content' nor 'tool_calls'"),
        ({"messages": [{"role": "user", "content": 5}]}, r"message 0: 'content': expected a text .* not int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"a part of type 'image'"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, r"message 0: 'content': a lone surrogate"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, r"message 0: 'weight' is 0.5"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, r"call 0: no function name"),
        ({"conversations": [{"from": "humans", "value": "a"}]}, r"'from' is 'humans'; known .* Did you mean 'human'\?"),
        ({"conversations": [{"from": "human"}]}, r"message 0: 'value': expected text, not NoneType"),
        ({"instruction": "a", "output": 5}, r"'output': expected text, not int"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, r"'history', turn 0: expected a pair"),
        ({"messages": MESSAGES, "system": "x"}, r"has a 'system' column and a system message"),
        ({"messages": MESSAGES[1:], "tools": 5}, r"'tools' must be a list of JSON schemas"),
    ],
)
def test_bad_rows_are_named(folders, row, message):
    with pytest.raises(DataError, match=message):
        build(folders["chatml"]).encode(row, "f: 3")


def test_bad_options_and_templates_are_named(folders, tmp_path):
    with pytest.raises(DataError, match=r"form = 'message': expected one of .* Did you mean 'messages'\?"):
        ConversationOptions(form="message")
    with pytest.raises(DataError, match=r"no 'messages', which the form 'messages' needs"):
        build(folders["chatml"], form="messages").encode({"message": MESSAGES}, "row")
    with pytest.raises(DataError, match=r"has no \{% generation %\} marks"):
        build(folders["chatml"], mask="marks").encode({"messages": MESSAGES}, "row")
    with pytest.raises(DataError, match=r"^row: the chat template of .*stripping.* roles must alternate"):
        build(folders["stripping"]).encode({"messages": MESSAGES + MESSAGES[4:]}, "row")
    broken = save_chat_tokenizer(tmp_path / "broken", "{% for m in messages %}")
    with pytest.raises(DataError, match=r"^row: the chat template of .*broken, line 1 "):
        build(broken).encode({"messages": MESSAGES}, "row")
    dropping = save_chat_tokenizer(
        tmp_path / "dropping",
        "{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    )
    with pytest.raises(DataError, match=r"renders nothing for message 2, an assistant's"):
        build(dropping).encode({"messages": MESSAGES}, "row")
    half = save_chat_tokenizer(
        tmp_path / "half",
        "{% for m in messages %}<|im_start|>{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}",
    )
    with pytest.raises(DataError, match=r"marks 1 spans for 2 assistant messages"):
        build(half).encode({"messages": MESSAGES}, "row")
