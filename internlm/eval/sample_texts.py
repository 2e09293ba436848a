"""Continues fixed prompts while a run goes on, so that people see what the model writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from internlm.core.hooks import Hook, RunningTrainer
from internlm.core.next_tokens import next_tokens
from internlm.eval.text_batches import TextBatches
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
        batches: the shape of micro-batches; no prompt with its continuation is longer than `batches.seq_len`.
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
        batches: TextBatches,
    ) -> None:
        self.every = every
        self._prompts = list(prompts)
        self._prompt_ids = [list(ids) for ids in prompt_ids]
        self._max_new_tokens = max_new_tokens
        self._num_tokens = num_tokens
        self._eos_ids = frozenset(eos_ids)
        self._decode = decode
        self._batches = batches

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
            for group in self._batches.groups([len(texts[number]) for number in growing]):
                numbers = [growing[place] for place in group]
                found |= dict(zip(numbers, self._pass(trainer, [texts[number] for number in numbers]), strict=True))
            growing = [number for number in growing if found[number] not in self._eos_ids]
            for number in growing:
                texts[number].append(found[number])
            if not growing:
                break
        return [ids[len(prompt) :] for ids, prompt in zip(texts, self._prompt_ids, strict=True)]

    def _pass(self, trainer: RunningTrainer, texts: Sequence[Sequence[int]]) -> list[int]:
        micro_batch, starts = self._batches.micro_batch(texts)
        ends = [(row, column + len(ids) - 1) for (row, column), ids in zip(starts, texts, strict=True)]
        return next_tokens(trainer.engine, micro_batch, ends, self._num_tokens)

    def _write(self, trainer: RunningTrainer, new: Sequence[list[int]]) -> None:
        if not trainer.is_main_rank:
            return
        step = trainer.state.step
        with (trainer.run_dir / SAMPLES_FILE).open("a", encoding="utf-8") as file:
            for prompt, ids in zip(self._prompts, new, strict=True):
                text = self._decode(ids)
                logger.info("step %d: %r goes on as %r", step, prompt, text)
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
