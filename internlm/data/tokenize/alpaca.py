"""Instruction data (Alpaca-style records) into tokenized files, with the prompt masked.

Owns the prompt, the mask and the split into train and valid. A record is `{"instruction", "input" (optional),
"output"}`; records are read one by one, twice: once to count them, once to write them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from internlm.data.order import permute
from internlm.data.tokenize.text_inputs import iterate_json_array, iterate_json_lines
from internlm.data.tokenize.text_tokenizer import TextTokenizer, check_code, load_tokenizer
from internlm.data.tokenized_writer import TokenizedWriter, encode_masked_line
from internlm.utils.errors import DataError

_BATCH = 256
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The prompts that models trained on the Alpaca data expect, to the letter."""

Render = Callable[[dict[str, str]], tuple[str, str]]
"""From a record to (prompt, response) texts."""


@dataclass(frozen=True)
class AlpacaResult:
    """Documents and tokens of each split, and how many of the tokens contribute loss."""

    train_documents: int
    valid_documents: int
    tokens: int
    target_tokens: int


def tokenize_alpaca(
    dataset: Path,
    output: Path,
    tokenizer_path: Path,
    *,
    valid_fraction: float = 0.1,
    seed: int = 1024,
    type_name: str = "en",
    chat_template: bool = False,
    add_bos: bool = False,
    trust_remote_code: bool = False,
) -> AlpacaResult:
    """Write `<output>/train/<type>/<name>.bin` and `<output>/valid/<type>/<name>.bin`.

    Args:
        dataset: a JSON array or JSON lines.
        valid_fraction: this share of the records, drawn without replacement, goes to valid.
        chat_template: build the prompt by the chat template of the tokenizer's folder; it then owns all special
            tokens: those before the response (a bos, for example) are masked, and all that the template puts behind
            it (end of turn, newline) is learned. Otherwise the Alpaca prompt is used, and the response ends with the
            tokenizer's eos.
        add_bos: begin with the tokenizer's bos (Alpaca prompt only).
        trust_remote_code: run the code of a tokenizer that is nothing else.

    Raises:
        DataError: a file is missing, malformed or already there.
    """
    if not 0 <= valid_fraction < 1:
        raise DataError(f"--valid-fraction {valid_fraction} is not in [0, 1)")
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=trust_remote_code)
    render = _chat_render(tokenizer_path, trust_remote_code) if chat_template else _alpaca_render
    before, after = ([], []) if chat_template else _ends(tokenizer_path, tokenizer, add_bos)
    count = sum(1 for _ in read_records(dataset))
    num_valid = round(count * valid_fraction)
    outputs = [output / split / type_name / f"{dataset.stem}.bin" for split in ("train", "valid")]
    if num_valid == 0:
        outputs = outputs[:1]
    for path in outputs:
        if path.exists():
            raise DataError(f"{path} exists: choose another folder, or remove it")
    writers = [TokenizedWriter(path) for path in outputs]
    target_tokens = 0
    try:
        for index, (prompt, response) in enumerate(_encode(map(render, read_records(dataset)), tokenizer)):
            ids = before + prompt + response + after
            loss_mask = [False] * (len(before) + len(prompt)) + [True] * (len(response) + len(after))
            is_valid = bool(num_valid) and int(permute(np.array([index]), count, seed)[0]) < num_valid
            writers[is_valid].write_line(encode_masked_line(ids, loss_mask), len(ids))
            target_tokens += len(response) + len(after)
        for writer in writers:
            writer.close()
    except BaseException:
        for writer in writers:
            writer.discard()
        raise
    documents = [writer.num_documents for writer in writers] + [0]
    return AlpacaResult(documents[0], documents[1], sum(writer.num_tokens for writer in writers), target_tokens)


def read_records(dataset: Path) -> Iterator[dict[str, str]]:
    """The records of a file, each with the texts "instruction", "input" and "output".

    Raises:
        DataError: the file is missing or malformed, or a record lacks a field; names its number.
    """
    if not dataset.is_file():
        raise DataError(f"{dataset}: no such file")
    records = iterate_json_lines(dataset) if dataset.suffix == ".jsonl" else iterate_json_array(dataset)
    for number, record in enumerate(records):
        place = f"{dataset}: record {number}"
        if not isinstance(record, dict):
            raise DataError(f"{place} is {type(record).__name__}, expected an object with 'instruction' and 'output'")
        fields = {"input": "", **record}
        for name in ("instruction", "input", "output"):
            if not isinstance(fields.get(name), str):
                raise DataError(f"{place}: '{name}' is missing or not a text; it has {sorted(record)}")
        if not fields["output"]:
            raise DataError(f"{place}: 'output' is empty, so there is nothing to learn; remove the record")
        yield {name: fields[name] for name in ("instruction", "input", "output")}


def _alpaca_render(record: dict[str, str]) -> tuple[str, str]:
    template = _WITH_INPUT if record["input"] else _WITHOUT_INPUT
    return template.format(instruction=record["instruction"], input=record["input"]), record["output"]


def _chat_render(tokenizer_path: Path, trust_remote_code: bool) -> Render:
    """Prompt and response by the tokenizer's own chat template."""
    from transformers import AutoTokenizer

    folder = tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent
    check_code(folder, trust_remote_code)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError) as error:
        raise DataError(f"{folder}: --chat-template needs a Hugging Face tokenizer folder: {error}") from error
    if not tokenizer.chat_template:
        raise DataError(f"{folder}: the tokenizer has no chat template; leave out --chat-template")

    def render(record: dict[str, str]) -> tuple[str, str]:
        question = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
        asked = [{"role": "user", "content": question}]
        answered = [*asked, {"role": "assistant", "content": record["output"]}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(answered, tokenize=False)
        if not whole.startswith(prompt):
            raise DataError(
                f"{folder}: the chat template does not continue its own generation prompt, so the response cannot be "
                f"told from the prompt {prompt!r}; leave out --chat-template"
            )
        return prompt, whole[len(prompt) :]

    return render


def _ends(path: Path, tokenizer: TextTokenizer, add_bos: bool) -> tuple[list[int], list[int]]:
    if tokenizer.eos_id is None:
        raise DataError(f"{path}: the tokenizer names no eos token, so a model could not learn where a response ends")
    if add_bos and tokenizer.bos_id is None:
        raise DataError(f"{path}: the tokenizer names no bos token; leave out --bos")
    return ([tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []), [tokenizer.eos_id]


def _encode(rendered: Iterator[tuple[str, str]], tokenizer: TextTokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt and response are encoded apart: at generation the prompt is encoded without the response too."""
    while batch := list(islice(rendered, _BATCH)):
        prompts = tokenizer.encode_batch([prompt for prompt, _ in batch])
        responses = tokenizer.encode_batch([response for _, response in batch])
        yield from zip(prompts, responses, strict=True)
