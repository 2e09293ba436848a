"""A language model as lm-evaluation-harness sees it (https://github.com/EleutherAI/lm-evaluation-harness).

Owns how requests become tokens, and what is cut. Importing it needs the package `lm_eval`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from internlm.apis.engine import Text
from internlm.apis.generation import DEFAULT_ROWS, generate
from internlm.apis.scoring import DEFAULT_TOKENS, Ending, score_endings
from internlm.data.conversations.chat_template import ChatTemplate
from internlm.eval.endings import encode_endings, with_first
from internlm.serve.harness_settings import GenerationSettings, read_generation_settings
from internlm.serve.language_model import LanguageModel
from internlm.serve.readable_text import ReadableText
from internlm.utils.errors import ConfigError, DataError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass
class RequestCounts:
    """Requests so far.

    Attributes:
        scored: endings.
        cut: of these, those whose context lost its beginning.
        joined: of these, those where a token covers the end of the context and the beginning of the ending.
        generated: texts.
        cut_prompts: of these, those whose prompt lost its beginning.
    """

    scored: int = 0
    cut: int = 0
    joined: int = 0
    generated: int = 0
    cut_prompts: int = 0


class HarnessModel(TemplateLM):
    """Scores and continues texts for lm-evaluation-harness.

    Where context and ending have more than `max_length` tokens, without the last one, which the model does not read,
    the beginning of the context is cut; where a prompt and its new tokens have more, the beginning of the prompt.

    Args:
        language: the model.
        max_length: tokens that the model reads at a time.
        bos_id: token that contexts and prompts begin with; None: none.
        tokens_at_once: of a pass that scores.
        num_rows: texts that are continued at a time.
        seed: of sampled texts.
        template: of chats; None if none is applied.

    Attributes:
        counts: of requests so far.
    """

    def __init__(
        self,
        language: LanguageModel,
        *,
        max_length: int,
        bos_id: int | None = None,
        tokens_at_once: int = DEFAULT_TOKENS,
        num_rows: int = DEFAULT_ROWS,
        seed: int = 0,
        template: ChatTemplate | None = None,
    ) -> None:
        super().__init__()
        self.counts = RequestCounts()
        self._language = language
        self._max_length = max_length
        self._bos_id = bos_id
        self._tokens_at_once = tokens_at_once
        self._num_rows = num_rows
        self._seed = seed
        self._template = template

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at a time."""
        return self._max_length

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text; None if the tokenizer has none."""
        return self._language.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int | None:
        """The token in front of a text without context: bos, or eos; None if the tokenizer has neither."""
        tokenizer = self._language.tokenizer
        return tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text, behind bos unless `add_special_tokens` is False."""
        (ids,) = self._language.tokenizer.encode_batch([string])
        return ids if add_special_tokens is False else with_first(self._bos_id, ids)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score endings of contexts.

        Raises:
            DataError: an ending has no token of its own, or more than `max_length`.
            NonFiniteError: a score is NaN.
        """
        endings = encode_endings(
            [request.args for request in requests],
            self._language.tokenizer.encode_batch,
            self.prefix_token_id,
            bos_id=self._bos_id,
        )
        for request, ending in zip(requests, endings, strict=True):
            if ending.start == len(ending.ids):
                raise DataError(
                    f"{_place(request)}: the ending {request.args[1]!r} has no token of its own behind its context"
                )
        self.counts.joined += sum(ending.is_joined for ending in endings)
        split = [
            (request.args, ending.ids[: ending.start], ending.ids[ending.start :])
            for request, ending in zip(requests, endings, strict=True)
        ]
        return self._loglikelihood_tokens(split, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        endings = []
        for (_, text), context, ending in requests:
            if len(ending) > self._max_length:
                raise DataError(
                    f"the ending {text[:40]!r}... has {len(ending)} tokens, more than the {self._max_length} that the "
                    "model reads; raise --max-length if it can read more"
                )
            ids = [*context, *ending][-self._max_length - 1 :]
            self.counts.cut += len(ids) < len(context) + len(ending)
            endings.append(Ending(ids, len(ids) - len(ending)))
        self.counts.scored += len(endings)
        with tqdm(total=len(endings), desc="Scoring", disable=disable_tqdm or None) as bar:
            scores = score_endings(
                self._language.model,
                endings,
                tokens_at_once=self._tokens_at_once,
                num_tokens=self._language.tokenizer.vocab_size,
                on_scored=bar.update,
            )
        return [(score.value, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts behind the prefix token, unless they begin with it, in windows of `max_length` tokens.

        Raises:
            DataError: the tokenizer has no prefix token.
            NonFiniteError: a score is NaN.
        """
        prefix = self.prefix_token_id
        if prefix is None:
            raise DataError("the tokenizer has no bos or eos to put in front of a text")
        windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            ids = with_first(prefix, self.tok_encode(text, add_special_tokens=False))[1:]
            for window in get_rolling_token_windows(ids, prefix, self._max_length, context_len=1):
                windows.append((("", text), *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[number] += value
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue prompts until a stop text, an end-of-text token, or the maximal length.

        The seed of a sampled text follows from its place among those of its task with the same settings.

        Raises:
            ConfigError: a task asks for something that is not supported.
            NonFiniteError: the model returns inf or NaN.
        """
        groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[request.task_name or "", json.dumps(request.args[1], sort_keys=True)].append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm or None) as bar:
            for (task, _), numbers in groups.items():
                settings = self._settings(task, requests[numbers[0]].args[1])
                prompts = [self._prompt(requests[number], settings) for number in numbers]
                for number, text in zip(numbers, self._continue(prompts, settings, bar), strict=True):
                    texts[number] = text
        self.counts.generated += len(requests)
        return texts

    def _settings(self, task: str, given: dict[str, Any]) -> GenerationSettings:
        language = self._language
        num_tokens = language.tokenizer.vocab_size
        try:
            settings = read_generation_settings(given, eos_ids=language.eos_ids, num_tokens=num_tokens, seed=self._seed)
        except ConfigError as error:
            raise ConfigError([f"task {task}: {mistake}" for mistake in error.mistakes]) from None
        num_new = settings.sampling.max_new_tokens
        if num_new >= self._max_length:
            raise ConfigError(
                f"task {task}: generation_kwargs asks for {num_new} new tokens, which leaves no room for a prompt "
                f"among the {self._max_length} tokens that the model reads; lower max_gen_toks, or raise --max-length "
                "if it can read more"
            )
        for notice in settings.notices:
            logger.warning("task %s: generation_kwargs: %s", task, notice)
        return settings

    def _prompt(self, request: Instance, settings: GenerationSettings) -> list[int]:
        ids = self.tok_encode(request.args[0])
        if not ids:
            if self.prefix_token_id is None:
                raise DataError(f"{_place(request)}: the prompt is empty, and the tokenizer has no bos or eos")
            ids = [self.prefix_token_id]
        room = self._max_length - settings.sampling.max_new_tokens
        self.counts.cut_prompts += len(ids) > room
        return ids[-room:]

    def _continue(self, prompts: Sequence[list[int]], settings: GenerationSettings, bar: Any) -> list[str]:
        readers: dict[int, ReadableText] = {}

        def on_token(text: Text) -> bool:
            # The seed numbers the texts of a call.
            number = text.sampling.seed - settings.sampling.seed
            reader = readers.setdefault(number, ReadableText(text, self._language.tokenizer, settings.stops))
            reader.read()
            bar.update(reader.finish_reason is not None)
            return reader.is_stopped

        generate(self._language.model, prompts, settings.sampling, num_rows=self._num_rows, on_token=on_token)
        return [readers[number].shown for number in range(len(prompts))]

    @property
    def tokenizer_name(self) -> str:
        """What tells the tokenizer and template from others."""
        template = "" if self._template is None else f"__{self._template.fingerprint}"
        return f"{self._language.tokenizer_path.name}{template}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja text of the template that is applied."""
        return None if self._template is None else self._template.source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation.

        Raises:
            ConfigError: the task begins the answer itself.
            DataError: the template refuses the messages.
        """
        assert self._template is not None
        if not add_generation_prompt:
            raise ConfigError(
                "a task begins the answer itself (gen_prefix), which does not work with --chat; leave out --chat"
            )
        text, _ = self._template.render(chat_history, None, "a prompt", add_generation_prompt=True)
        return text


def _place(request: Instance) -> str:
    return f"task {request.task_name}, document {request.doc_id}"
