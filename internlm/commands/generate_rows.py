"""The JSON lines that `internlm generate` writes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from internlm.apis.engine import Prompt, Text
from internlm.apis.generation import beam_search, generate
from internlm.apis.sampling import Sampling
from internlm.serve.language_model import LanguageModel
from internlm.serve.prompt_rows import PromptRow
from internlm.serve.readable_text import ReadableText
from internlm.utils.errors import ConfigError


def write_rows(
    language: LanguageModel,
    rows: list[PromptRow],
    prompts: list[Prompt],
    sampling: Sampling,
    args: argparse.Namespace,
    output: TextIO,
) -> None:
    """Write the row of each prompt with its completions in the order of the prompts, when it is complete."""
    if args.beams > 1:
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            own = replace(sampling, seed=sampling.seed + number * args.samples)
            beams = best_beams(language, prompt, own, args)
            _write_row(row, [{"text": text, "score": score} for text, score in beams], output)
        return
    results: list[dict[int, dict[str, Any]]] = [{} for _ in rows]
    written = 0
    readers: dict[int, ReadableText] = {}
    numbers = {id(prompt): number for number, prompt in enumerate(prompts)}

    def on_token(text: Text) -> bool:
        nonlocal written
        reader = readers.setdefault(id(text), ReadableText(text, language.tokenizer, args.stop))
        reader.read()
        if reader.finish_reason is not None:
            number = numbers[id(text.prompt)]
            sample = text.sampling.seed - sampling.seed - number * args.samples
            results[number][sample] = _completion(reader, language)
            while written < len(rows) and len(results[written]) == args.samples:
                _write_row(rows[written], [results[written][each] for each in range(args.samples)], output)
                written += 1
        return reader.is_stopped

    generate(language.model, prompts, sampling, num_samples=args.samples, num_rows=args.batch, on_token=on_token)


def _write_row(row: PromptRow, completions: list[dict[str, Any]], output: TextIO) -> None:
    output.write(json.dumps({**row.fields, "completions": completions}, ensure_ascii=False) + "\n")
    output.flush()


def _completion(reader: ReadableText, language: LanguageModel) -> dict[str, Any]:
    text = reader.text
    found: dict[str, Any] = {
        "text": reader.shown,
        "finish_reason": reader.finish_reason,
        "token_ids": list(text.new_ids),
    }
    if text.sampling.top_logprobs is not None:
        pieces = language.tokenizer.pieces()
        found["logprobs"] = [
            {
                "value": each.value,
                "top": [[pieces[id] if id < len(pieces) else "", id, value] for id, value in each.top],
            }
            for each in text.logprobs
        ]
    return found


def best_beams(
    language: LanguageModel, prompt: Prompt, sampling: Sampling, args: argparse.Namespace
) -> list[tuple[str, float]]:
    """The text and score of each beam, best first."""
    beams = beam_search(
        language.model,
        prompt,
        sampling,
        num_beams=args.beams,
        num_samples=args.samples,
        length_penalty=args.length_penalty,
    )
    found = []
    for beam in beams:
        has_end = bool(beam.ids) and beam.ids[-1] in sampling.eos_ids
        text = Text(prompt, sampling, list(beam.ids), finish_reason="stop" if has_end else "length")
        found.append((ReadableText(text, language.tokenizer).read(), beam.score))
    return found


@contextmanager
def output_file(path: Path | None) -> Iterator[TextIO]:
    """A new file, or stdout."""
    if path is None:
        yield sys.stdout
        return
    try:
        with path.open("x", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror or error}") from error
