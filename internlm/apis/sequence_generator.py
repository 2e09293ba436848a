"""Generation with the argument names of InternEvo's `SequenceGenerator`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from internlm.apis.engine import GenerationEngine, GenerativeModel, NonFiniteError, Prompt, Text
from internlm.apis.generation import beam_search, evaluating, generate
from internlm.apis.sampling import Sampling
from internlm.utils.errors import ConfigError


class SequenceGenerator:
    """Continues batches of prompts that are padded on the left.

    Differences from InternEvo: with `do_sample`, the first new token is sampled as well; top-p may keep a single token;
    several samples do not need beams; a text that reaches `max_length` is returned as it is, without an end in place of
    its last token; `bos_token_id` and `pad_token_id` may differ.

    Args:
        decoder: a decoder of `internlm.model`, on the device of the tokens.
        eos_token_id: token, or tokens, that end a text.
        pad_token_id: fills up short prompts on the left, and short texts on the right.
        bos_token_id: token that begins a text; a prompt begins with it, or with its first token that is no padding.
        additional_eos_token_list: further tokens that end a text.
        add_eos_when_return: append `eos_token_id` to every text that did not end with it.
        seed: of the random numbers of the next call; each call continues them.
    """

    def __init__(
        self,
        decoder: GenerativeModel,
        eos_token_id: int | Sequence[int],
        pad_token_id: int,
        bos_token_id: int,
        additional_eos_token_list: Sequence[int] | None = None,
        add_eos_when_return: bool = False,
        *,
        seed: int = 0,
    ) -> None:
        self.decoder = decoder
        own = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        if not own:
            raise ConfigError("eos_token_id: must have a token")
        self.eos_ids = tuple(dict.fromkeys((*own, *(additional_eos_token_list or ()))))
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.add_eos_when_return = add_eos_when_return
        self._next_seed = seed

    def generate(
        self,
        tokens: Tensor,
        num_return_sequences: int = 1,
        max_length: int = 20,
        num_beams: int = 1,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        min_new_tokens: int = 1,
    ) -> Tensor:
        """Continue each prompt.

        Args:
            tokens: int64 `[B, S]`, prompts padded on the left.
            num_return_sequences: texts for each prompt.
            max_length: tokens of a padded prompt and its continuation together, more than S.
            num_beams: 1: none; more: beam search.
            do_sample, temperature, top_k, top_p, repetition_penalty: see `Sampling`; without `do_sample`, temperature,
                top_k and top_p have no effect.
            length_penalty: see `beam_search`.
            min_new_tokens: see `Sampling`.

        Returns:
            int64 `[B, num_return_sequences, length]` with the padded prompts.

        Raises:
            ConfigError: an argument is invalid.
            NonFiniteError: the model returns inf or NaN.
        """
        sampling = self._sampling(
            tokens, max_length, do_sample, temperature, top_k, top_p, repetition_penalty, min_new_tokens
        )
        prompts = [Prompt(ids) for ids in self._unpadded(tokens)]
        self._next_seed += len(prompts) * num_return_sequences
        new: list[list[list[int]]]
        if num_beams > 1:
            found = [
                beam_search(
                    self.decoder,
                    prompt,
                    sampling,
                    num_beams=num_beams,
                    num_samples=num_return_sequences,
                    length_penalty=length_penalty,
                )
                for prompt in prompts
            ]
            new = [[list(beam.ids) for beam in beams] for beams in found]
        else:
            texts = generate(self.decoder, prompts, sampling, num_samples=num_return_sequences)
            new = [[text.new_ids for text in own] for own in texts]
        return self._padded(tokens, new, num_return_sequences)

    def streaming_generate(
        self,
        tokens: Tensor,
        max_length: int = 20,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        min_new_tokens: int = 1,
    ) -> Iterator[Tensor]:
        """Yield int64 `[B, 1, length]` whenever texts have grown; the arguments are those of `generate`."""
        sampling = self._sampling(
            tokens, max_length, do_sample, temperature, top_k, top_p, repetition_penalty, min_new_tokens
        )
        texts = [
            Text(Prompt(ids), replace(sampling, seed=sampling.seed + number))
            for number, ids in enumerate(self._unpadded(tokens))
        ]
        self._next_seed += len(texts)
        with evaluating(self.decoder):
            engine = GenerationEngine(self.decoder, num_rows=len(texts), max_length=max_length)
            for text in texts:
                engine.submit(text)
            while not engine.is_idle:
                changed = engine.step()
                if any(text.finish_reason == "failed" for text in changed):
                    raise NonFiniteError("the model's logits contain inf or NaN")
                if all(text.new_ids for text in texts):
                    yield self._padded(tokens, [[text.new_ids] for text in texts], 1)

    def _sampling(
        self,
        tokens: Tensor,
        max_length: int,
        do_sample: bool,
        temperature: float,
        top_k: int,
        top_p: float,
        repetition_penalty: float,
        min_new_tokens: int,
    ) -> Sampling:
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.shape[1] == 0:
            raise ConfigError(f"tokens: must be int64 [prompts, tokens >= 1], got {tokens.dtype} {list(tokens.shape)}")
        if max_length <= tokens.shape[1]:
            raise ConfigError(
                f"max_length = {max_length}: counts the prompt, so it must be more than its {tokens.shape[1]} tokens"
            )
        choices = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if do_sample else {}
        return Sampling(
            max_new_tokens=max_length - tokens.shape[1],
            min_new_tokens=min_new_tokens,
            do_sample=do_sample,
            repetition_penalty=repetition_penalty,
            eos_ids=self.eos_ids,
            seed=self._next_seed,
            **choices,  # type: ignore[arg-type]
        )

    def _unpadded(self, tokens: Tensor) -> list[list[int]]:
        """The prompts without the padding on their left. One that begins with bos keeps a single bos."""
        prompts = []
        for row in tokens.tolist():
            start = 0
            while (
                start < len(row) - 1
                and row[start] == self.pad_token_id
                and (self.pad_token_id != self.bos_token_id or row[start + 1] == self.bos_token_id)
            ):
                start += 1
            prompts.append(row[start:])
        return prompts

    def _padded(self, tokens: Tensor, new: list[list[list[int]]], num_sequences: int) -> Tensor:
        """The padded prompts with these texts, padded on the right."""
        eos = self.eos_ids[0]
        if self.add_eos_when_return:
            new = [[ids if ids and ids[-1] in self.eos_ids else [*ids, eos] for ids in texts] for texts in new]
        longest = max(len(ids) for texts in new for ids in texts)
        rows = [
            [
                prompt + ids + [self.pad_token_id] * (longest - len(ids))
                for ids in texts + [[]] * (num_sequences - len(texts))
            ]
            for prompt, texts in zip(tokens.tolist(), new, strict=True)
        ]
        return torch.tensor(rows, device=tokens.device)
