"""Continues fixed prompts while a run goes on, so that people see what the model writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np

from internlm.core.hooks import Hook, RunningTrainer
from internlm.core.next_tokens import next_tokens
from internlm.data.packing.collate import to_micro_batch
from internlm.data.packing.document_slice import DocumentSlice, make_slice
from internlm.data.packing.sample import concatenate_slices, stack_slices
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

SAMPLES_FILE = "samples.jsonl"


class SampleTextsHook(Hook):
    """Continues prompts greedily every `every` steps and after the last one, in any layout.

    A token costs a forward pass over a whole micro-batch, as there is no cache: passes of an evaluation work in every
    layout. Texts go to the log and, with the step, to samples.jsonl in the folder of the run.

    Args:
        every: steps between two times.
        prompts: their texts.
        prompt_ids: their tokens, at least one each.
        max_new_tokens: tokens to append to each.
        num_tokens: ids from this one on (the padding of the vocabulary) are never chosen.
        eos_ids: tokens that end a text.
        decode: tokens -> text.
        seq_len: length of an attention segment; no prompt with its continuation is longer.
        rows: of a micro-batch.
        is_packed: whether micro-batches are packed.
    """

    name = "sample_texts"

    def __init__(
        self,
        every: int,
        prompts: Sequence[str],
        prompt_ids: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        num_tokens: int,
        eos_ids: Sequence[int],
        decode: Callable[[list[int]], str],
        seq_len: int,
        rows: int,
        is_packed: bool,
    ) -> None:
        self.every = every
        self._prompts = list(prompts)
        self._prompt_ids = [list(ids) for ids in prompt_ids]
        self._max_new_tokens = max_new_tokens
        self._num_tokens = num_tokens
        self._eos_ids = frozenset(eos_ids)
        self._decode = decode
        self._seq_len = seq_len
        self._rows = rows
        self._is_packed = is_packed

    def on_step_counted(self, trainer: RunningTrainer) -> None:
        step = trainer.state.step
        if step % self.every == 0 or step == trainer.total_steps:
            self._write(trainer, self.continued(trainer))

    def continued(self, trainer: RunningTrainer) -> list[list[int]]:
        """The new tokens of each prompt, without one that ends the text; collective, the same on all ranks."""
        texts = [list(ids) for ids in self._prompt_ids]
        growing = list(range(len(texts)))
        for _ in range(self._max_new_tokens):
            found: dict[int, int] = {}
            for group in self._groups([len(texts[number]) for number in growing]):
                numbers = [growing[place] for place in group]
                found |= dict(zip(numbers, self._pass(trainer, [texts[number] for number in numbers]), strict=True))
            growing = [number for number in growing if found[number] not in self._eos_ids]
            for number in growing:
                texts[number].append(found[number])
            if not growing:
                break
        return [ids[len(prompt) :] for ids, prompt in zip(texts, self._prompt_ids, strict=True)]

    def _groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Places of the texts that fit into one micro-batch each, in order."""
        groups: list[list[int]] = []
        room = 0
        for place, length in enumerate(lengths):
            size = length if self._is_packed else 1
            if size > room or not groups:
                groups.append([])
                room = self._rows * self._seq_len if self._is_packed else self._rows
            groups[-1].append(place)
            room -= size
        return groups

    def _pass(self, trainer: RunningTrainer, texts: Sequence[Sequence[int]]) -> list[int]:
        slices: list[DocumentSlice] = []
        ends: list[tuple[int, int]] = []
        filled = 0
        for row, ids in enumerate(texts):
            tokens = np.array(ids, dtype=np.int64)
            slices.append(make_slice(tokens, np.zeros(len(tokens), dtype=np.bool_), len(tokens)))
            filled += len(tokens)
            ends.append((0, filled - 1) if self._is_packed else (row, len(tokens) - 1))
        if self._is_packed:
            sample = concatenate_slices(slices, self._seq_len, self._rows * self._seq_len, "cut", 0, document_mask=True)
        else:
            sample = stack_slices(slices, self._seq_len, self._rows, type_id=0)
        return next_tokens(trainer.engine, to_micro_batch(sample), ends, self._num_tokens)

    def _write(self, trainer: RunningTrainer, new: Sequence[list[int]]) -> None:
        if not trainer.is_main_rank:
            return
        step = trainer.state.step
        with (trainer.run_dir / SAMPLES_FILE).open("a", encoding="utf-8") as file:
            for prompt, ids in zip(self._prompts, new, strict=True):
                text = self._decode(ids)
                logger.info("step %d: %r goes on as %r", step, prompt, text)
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
