"""Continues token sequences: greedily, by sampling, or by beam search.

Works on token ids and knows neither tokenizers nor checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from internlm.apis.engine import (
    GenerationEngine,
    GenerativeModel,
    NonFiniteError,
    Prompt,
    Text,
    append_tokens,
    rows_are_independent,
)
from internlm.apis.sampling import Sampling, adjust, filter_logits
from internlm.utils.errors import ConfigError

DEFAULT_ROWS = 8
"""Texts that are computed at a time."""


def generate(
    model: GenerativeModel,
    prompts: Sequence[Sequence[int] | Prompt],
    sampling: Sampling,
    *,
    num_samples: int = 1,
    num_rows: int = DEFAULT_ROWS,
    on_token: Callable[[Text], bool | None] | None = None,
) -> list[list[Text]]:
    """Continue prompts of any lengths, each `num_samples` times.

    Sample s of prompt p has the seed `sampling.seed + p * num_samples + s`, so a text depends neither on the texts
    beside it nor on `num_rows`, apart from rounding.

    Args:
        model: a decoder; it is in evaluation mode during the call.
        prompts: tokens of each prompt, at least one.
        sampling: settings of all texts.
        num_samples: texts for each prompt; more than one only with `sampling.do_sample`.
        num_rows: texts that are computed at a time, which bounds the memory of keys and values.
        on_token: called with a text when it has a new token; returning True ends the text.

    Returns:
        The texts of each prompt.

    Raises:
        ConfigError: an argument is invalid.
        NonFiniteError: the model returns inf or NaN.
    """
    if num_samples < 1 or num_rows < 1:
        raise ConfigError(f"num_samples = {num_samples} and num_rows = {num_rows} must be at least 1")
    if num_samples > 1 and not sampling.do_sample:
        raise ConfigError(
            f"num_samples = {num_samples}: greedy texts of one prompt are all the same; sample, or use beam search"
        )
    sampling.check()
    starts = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    texts = [
        Text(prompt, replace(sampling, seed=sampling.seed + number * num_samples + sample))
        for number, prompt in enumerate(starts)
        for sample in range(num_samples)
    ]
    if not texts:
        return []
    longest = max(len(prompt.ids) for prompt in starts) + sampling.max_new_tokens
    with evaluating(model):
        engine = GenerationEngine(model, num_rows=min(num_rows, len(texts)), max_length=longest)
        for text in texts:
            engine.submit(text)
        while not engine.is_idle:
            for text in engine.step():
                if text.finish_reason == "failed":
                    position = len(text.prompt.ids) + len(text.new_ids)
                    raise NonFiniteError(f"token {position}: the model's logits contain inf or NaN")
                if on_token is not None and on_token(text):
                    engine.cancel(text)
    return [texts[start : start + num_samples] for start in range(0, len(texts), num_samples)]


@dataclass(frozen=True)
class Beam:
    """A text found by beam search.

    Attributes:
        ids: its new tokens; the last one may be an end.
        score: sum of its tokens' (adjusted) log-probabilities, divided by their number to the power of the length
            penalty.
    """

    ids: tuple[int, ...]
    score: float


@torch.inference_mode()
def beam_search(
    model: GenerativeModel,
    prompt: Sequence[int] | Prompt,
    sampling: Sampling,
    *,
    num_beams: int,
    num_samples: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> list[Beam]:
    """The likeliest continuations of a prompt that a search with `num_beams` texts at a time finds.

    As transformers' beam search: a text that is among the best `num_beams` candidates of a step and ends is kept by its
    score; the search ends if the best growing text, as long as it is, cannot beat the worst of `num_beams` kept ones.

    Args:
        model: a decoder; it is in evaluation mode during the call.
        prompt: its tokens, at least one.
        sampling: settings; with `do_sample`, candidates are drawn instead of being the likeliest ones. Penalties,
            temperature and filters apply to log-probabilities. `top_logprobs` must be None.
        num_beams: texts at a time.
        num_samples: texts that are returned.
        length_penalty: exponent of the length in the score; above 0 longer texts gain.
        early_stopping: end as soon as `num_beams` texts have ended.

    Returns:
        The best `num_samples` texts, best first; fewer if fewer ended.

    Raises:
        ConfigError: an argument is invalid.
        NonFiniteError: the model returns inf or NaN.
    """
    sampling.check()
    if not 1 <= num_samples <= num_beams:
        raise ConfigError(f"num_samples = {num_samples}: must be from 1 to num_beams = {num_beams}")
    if sampling.top_logprobs is not None:
        raise ConfigError("top_logprobs: beam search returns the score of a text, not log-probabilities of tokens")
    prompt = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
    if not prompt.ids:
        raise ConfigError("the prompt is empty: it must have a token")
    with evaluating(model):
        return _search(model, prompt, sampling, num_beams, length_penalty, early_stopping)[:num_samples]


def _search(
    model: GenerativeModel,
    prompt: Prompt,
    sampling: Sampling,
    num_beams: int,
    length_penalty: float,
    early_stopping: bool,
) -> list[Beam]:
    cache = model.make_cache(num_beams, len(prompt.ids) + sampling.max_new_tokens)
    row_by_row = not rows_are_independent(model)
    hidden = append_tokens(model, cache, [prompt.ids], 0, prompt.inputs, row_by_row=row_by_row)
    device = hidden.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    growing: list[tuple[int, ...]] = [()]
    scores = torch.zeros(1, device=device)
    ended: list[Beam] = []
    # So many that `num_beams` of them do not end, even if every text has all ends as candidates.
    num_candidates = max(2, 1 + len(sampling.eos_ids)) * num_beams
    for length in range(1, sampling.max_new_tokens + 1):
        logprobs = _adjusted_logprobs(model.logits(hidden[:, -1]).float(), prompt, growing, sampling)
        sums = (logprobs + scores[:, None]).flatten()
        count = min(num_candidates, int(sums.isfinite().sum()))
        if sampling.do_sample:
            places = torch.multinomial(sums.softmax(dim=0), count, generator=generator)
        else:
            places = sums.topk(count).indices
        sources, tokens = places // logprobs.shape[1], (places % logprobs.shape[1]).tolist()
        candidates = [
            (source, (*growing[source], token), score)
            for source, token, score in zip(sources.tolist(), tokens, sums[places].tolist(), strict=True)
        ]
        is_last = length == sampling.max_new_tokens
        ends = [is_last or ids[-1] in sampling.eos_ids for _, ids, _ in candidates]
        ended += [
            Beam(ids, score / length**length_penalty)
            for (_, ids, score), end in zip(candidates[:num_beams], ends[:num_beams], strict=True)
            if end
        ]
        ended = sorted(ended, key=lambda beam: -beam.score)[:num_beams]
        going = [candidate for candidate, end in zip(candidates, ends, strict=True) if not end]
        going = sorted(going, key=lambda candidate: -candidate[2])[:num_beams]
        if not going or (len(ended) == num_beams and early_stopping):
            break
        if len(ended) == num_beams and going[0][2] / length**length_penalty <= ended[-1].score:
            break
        if length == 1:
            for row in range(1, len(going)):
                cache.copy_row(0, row)
        else:
            cache.reorder(torch.tensor([source for source, _, _ in going], device=device))
        growing = [ids for _, ids, _ in going]
        scores = torch.tensor([score for _, _, score in going], device=device)
        hidden = append_tokens(model, cache, [[ids[-1]] for ids in growing], row_by_row=row_by_row)
    return ended


def _adjusted_logprobs(logits: Tensor, prompt: Prompt, growing: list[tuple[int, ...]], sampling: Sampling) -> Tensor:
    """Log-probabilities of the next token of each text, `[len(growing), V]`, with penalties and filters."""
    if not bool(logits.amax(dim=-1).isfinite().all()):
        raise NonFiniteError(f"token {len(prompt.ids) + len(growing[0])}: the model's logits contain inf or NaN")
    logprobs = logits.log_softmax(dim=-1)
    rows = [adjust(row, sampling, prompt.ids, ids) for row, ids in zip(logprobs, growing, strict=True)]
    adjusted = torch.stack(rows)
    if not sampling.do_sample:
        return adjusted
    return filter_logits(adjusted, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)


@contextmanager
def evaluating(model: GenerativeModel) -> Iterator[None]:
    """Put a model into evaluation mode, and back into its mode."""
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)
