"""Continues many texts at a time with one model.

Each has a row of the key-value cache, which a waiting text takes as soon as another ends (continuous batching, Orca,
https://www.usenix.org/conference/osdi22/presentation/yu).

Works on token ids and knows neither tokenizers nor checkpoints. V is the size of the vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from internlm.apis.sampling import Sampling, adjust, choose
from internlm.model.moe.router import Router
from internlm.utils.errors import ConfigError, UserError

CHUNK = 512
"""Tokens of prompts that are computed between two tokens of the other texts."""


class NonFiniteError(UserError):
    """The weights or the logits contain inf or NaN."""


class CacheRows(Protocol):
    """Rows of a cache for one forward pass; see `internlm.model.modules.cache.CachedRows`."""

    def position_ids(self, num_tokens: int) -> Tensor: ...


class Cache(Protocol):
    """Keys and values of the texts so far, in rows; see `internlm.model.modules.cache.KeyValueCache`."""

    lengths: list[int]

    def rows(self, start: int = 0, stop: int | None = None) -> CacheRows: ...

    def clear(self, row: int) -> None: ...

    def copy_row(self, source: int, target: int) -> None: ...

    def truncate(self, row: int, length: int) -> None: ...

    def reorder(self, sources: Tensor) -> None: ...


@runtime_checkable
class GenerativeModel(Protocol):
    """The interface that generation needs of a model; every decoder of `internlm.model` implements it.

    Attributes:
        training: as of `nn.Module`.
        prefills_in_chunks: whether the keys of a prompt's token are the same if the prompt is computed in pieces.
    """

    training: bool
    prefills_in_chunks: bool

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, *, cache: CacheRows | None = None, **inputs: Any
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def make_cache(self, num_rows: int, max_length: int) -> Cache: ...

    def train(self, mode: bool = True) -> object: ...


@dataclass(eq=False)
class Prompt:
    """The beginning of one or several texts; texts that share one compute it once.

    Attributes:
        ids: its tokens, at least one.
        inputs: further arguments of the model with it, such as `images` and `extra` of a LLaVA.
    """

    ids: Sequence[int]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    logits: Tensor | None = field(default=None, repr=False)
    """Of its last token, `[V]`, once they are computed."""


@dataclass(frozen=True)
class Logprob:
    """How likely a token was by the model itself: before penalties, temperature and filters.

    Attributes:
        value: natural logarithm of its probability.
        top: the most likely tokens in its place and their log-probabilities, likeliest first.
    """

    value: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Text:
    """A text to continue, and its continuation.

    Attributes:
        prompt: where it begins.
        sampling: how it goes on.
        new_ids: its new tokens; the last one may be an end, see `finish_reason`.
        logprobs: of each new token, unless `Sampling.top_logprobs` is None.
        finish_reason: "stop" after one of `Sampling.eos_ids`; "length" after `Sampling.max_new_tokens`; "cancelled";
            "failed" if its logits became inf or NaN; None before its end.
    """

    prompt: Prompt
    sampling: Sampling
    new_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "cancelled", "failed"] | None = None
    generator: torch.Generator | None = field(default=None, repr=False)

    @property
    def num_readable(self) -> int:
        """The number of new tokens without one that ends the text."""
        return len(self.new_ids) - (self.finish_reason == "stop")


class GenerationEngine:
    """Continues texts step by step. Not thread-safe.

    A step computes up to `chunk` tokens of waiting prompts, then one token of every text whose prompt is complete. The
    tokens of a text do not depend on the texts beside it, apart from rounding.

    Args:
        model: in evaluation mode.
        num_rows: texts at a time; others wait.
        max_length: tokens of a prompt and its continuation together.
        chunk: see `CHUNK`.
    """

    def __init__(self, model: GenerativeModel, *, num_rows: int, max_length: int, chunk: int = CHUNK) -> None:
        self.model = model
        self.num_rows = num_rows
        self.max_length = max_length
        self._row_by_row = not rows_are_independent(model)
        self._chunk = chunk if model.prefills_in_chunks and not self._row_by_row else max_length
        self._cache = model.make_cache(num_rows, max_length)
        self._waiting: deque[Text] = deque()
        # Rows 0, 1 ... hold the texts that grow; the row behind them the one whose prompt is being computed.
        self._growing: list[Text] = []
        self._starting: Text | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no text is left."""
        return not (self._waiting or self._growing or self._starting)

    @property
    def num_texts(self) -> int:
        """Texts that wait, start or grow."""
        return len(self._waiting) + len(self._growing) + (self._starting is not None)

    def submit(self, text: Text) -> None:
        """Add a text behind the waiting ones.

        Raises:
            ConfigError: its settings are invalid, its prompt is empty, or it may exceed `max_length`.
        """
        text.sampling.check()
        if not text.prompt.ids:
            raise ConfigError("the prompt is empty: it must have a token")
        length, limit = len(text.prompt.ids), text.sampling.max_new_tokens
        if length + limit > self.max_length:
            raise ConfigError(
                f"{length} tokens of the prompt and max_new_tokens = {limit} are more than {self.max_length} together; "
                "shorten the prompt, or lower max_new_tokens"
            )
        self._waiting.append(text)

    def cancel(self, text: Text) -> None:
        """End a text; its row is free at once. A text that has ended is left as it is."""
        if text.finish_reason is None:
            text.finish_reason = "cancelled"
            self._remove(text)

    @torch.inference_mode()
    def step(self) -> list[Text]:
        """Go on by one token; returns the texts that have a new one, or failed."""
        changed = self._start_texts()
        growing = [text for text in self._growing if text not in changed]
        if growing:
            # New ones are in the last rows, and get their second token in the next step.
            changed += self._grow(growing)
        return changed

    def _start_texts(self) -> list[Text]:
        """Compute pieces of prompts, and the first token of the texts whose prompts are complete."""
        changed: list[Text] = []
        # The texts that grow wait for no more tokens than these.
        budget = self._chunk
        while len(self._growing) < self.num_rows:
            if self._starting is None:
                if not self._waiting:
                    break
                self._starting = self._waiting.popleft()
                self._cache.lengths[len(self._growing)] = 0
            text, row = self._starting, len(self._growing)
            sibling = next((i for i, other in enumerate(self._growing) if other.prompt is text.prompt), None)
            if sibling is not None:
                self._cache.copy_row(sibling, row)
                self._cache.truncate(row, len(text.prompt.ids))
            else:
                piece = self._next_piece(text.prompt, row)
                # Never cut differently: a text is the same to the last bit beside any others.
                if len(piece) > budget and budget < self._chunk:
                    break
                budget -= len(piece)
                if not self._compute_piece(text.prompt, piece, row):
                    break
            self._starting = None
            self._growing.append(text)
            changed.append(text)
            assert text.prompt.logits is not None
            self._add_tokens([text], text.prompt.logits.unsqueeze(0))
        return changed

    def _next_piece(self, prompt: Prompt, row: int) -> Sequence[int]:
        """The tokens of a prompt that are computed next."""
        done = self._cache.lengths[row]
        # Further inputs belong to the whole prompt.
        return prompt.ids if prompt.inputs else prompt.ids[done : done + self._chunk]

    def _compute_piece(self, prompt: Prompt, piece: Sequence[int], row: int) -> bool:
        """Append a piece of a prompt to a row; returns whether the prompt is complete."""
        hidden = self._append([piece], row, prompt.inputs)
        if self._cache.lengths[row] < len(prompt.ids):
            return False
        prompt.logits = self.model.logits(hidden[:, -1])[0].float()
        return True

    def _grow(self, texts: list[Text]) -> list[Text]:
        """Append a token to these texts, which have the first rows."""
        hidden = self._append([[text.new_ids[-1]] for text in texts], 0, {})
        self._add_tokens(texts, self.model.logits(hidden[:, -1]).float())
        return texts

    def _append(self, ids: Sequence[Sequence[int]], first: int, inputs: Mapping[str, Any]) -> Tensor:
        return append_tokens(self.model, self._cache, ids, first, inputs, row_by_row=self._row_by_row)

    def _add_tokens(self, texts: Sequence[Text], logits: Tensor) -> None:
        """Choose the next token of each text from its logits `[len(texts), V]`, and free the rows of those that end."""
        # The maximum is NaN if any logit is. Single logits of -inf are valid.
        is_finite = logits.amax(dim=-1).isfinite().tolist()
        for text, own_logits, is_valid in zip(list(texts), logits, is_finite, strict=True):
            if is_valid:
                add_token(text, own_logits)
            else:
                text.finish_reason = "failed"
                self._cache.clear(self._growing.index(text))
        for text in texts:
            if text.finish_reason is not None:
                self._remove(text)

    def _remove(self, text: Text) -> None:
        """Forget a text, and let the last growing one take its row."""
        if text is self._starting:
            # Nobody has looked whether what is computed is finite.
            self._cache.clear(len(self._growing))
            self._starting = None
        elif text in self._growing:
            row, last = self._growing.index(text), len(self._growing) - 1
            self._cache.copy_row(last, row)
            self._growing[row] = self._growing[last]
            self._growing.pop()
            if self._starting is not None:
                self._cache.copy_row(last + 1, last)
                self._cache.clear(last + 1)
        elif text in self._waiting:
            self._waiting.remove(text)


def append_tokens(
    model: GenerativeModel,
    cache: Cache,
    ids: Sequence[Sequence[int]],
    first: int = 0,
    inputs: Mapping[str, Any] = MappingProxyType({}),
    *,
    row_by_row: bool,
) -> Tensor:
    """Append S tokens to each of some rows of a cache.

    Args:
        model: in evaluation mode.
        cache: of the model.
        ids: the tokens, of the rows from `first` on.
        first: row.
        inputs: further arguments of the model.
        row_by_row: each row has a forward pass of its own; see `rows_are_independent`.

    Returns:
        Hidden states, `[len(ids), S, h]`.
    """
    step = 1 if row_by_row else len(ids)
    hidden = []
    for start in range(0, len(ids), step):
        rows = cache.rows(first + start, first + min(start + step, len(ids)))
        position_ids = rows.position_ids(len(ids[0]))
        tokens = torch.tensor([list(row) for row in ids[start : start + step]], device=position_ids.device)
        hidden.append(model(tokens, position_ids, cache=rows, **inputs))
    return torch.cat(hidden) if len(hidden) > 1 else hidden[0]


def rows_are_independent(model: GenerativeModel) -> bool:
    """Whether the results of a text are the same with others in the pass: not if they compete for places of experts."""
    assert isinstance(model, nn.Module)
    routers = (module for module in model.modules() if isinstance(module, Router))
    return all(router.selection.capacity is None for router in routers)


def add_token(text: Text, logits: Tensor) -> None:
    """Choose the next token of a text from its finite logits `[V]`, and end the text if it is its last one."""
    sampling = text.sampling
    if text.generator is None:
        text.generator = torch.Generator(logits.device).manual_seed(sampling.seed)
    id = choose(adjust(logits, sampling, text.prompt.ids, text.new_ids), sampling, text.generator)
    text.new_ids.append(id)
    if sampling.top_logprobs is not None:
        logprobs = logits.log_softmax(dim=-1)
        text.logprobs.append(logprob_of(id, logprobs, sampling.top_logprobs, sampling.num_tokens))
    if id in sampling.eos_ids:
        text.finish_reason = "stop"
    elif len(text.new_ids) == sampling.max_new_tokens:
        text.finish_reason = "length"


def logprob_of(id: int, logprobs: Tensor, num_top: int, num_tokens: int | None = None) -> Logprob:
    """How likely a token is, from the log-probabilities `[V]` of all tokens in its place.

    Args:
        id: the token.
        logprobs: float `[V]`.
        num_top: number of the most likely tokens that are returned beside it.
        num_tokens: ids from this one on (the padding of the vocabulary) are not among these; None allows all ids.
    """
    best = logprobs[:num_tokens].topk(num_top)
    return Logprob(float(logprobs[id]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
