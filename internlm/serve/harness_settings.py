"""What a task of lm-evaluation-harness asks of a generated text, as settings of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internlm.apis.sampling import Sampling
from internlm.utils.errors import ConfigError

DEFAULT_NEW_TOKENS = 256
"""As in lm-evaluation-harness."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_FOR_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
_FOR_ALL = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_KNOWN = ("until", "do_sample", "num_beams", *_LENGTHS, *_FOR_SAMPLING, *_FOR_ALL)


@dataclass(frozen=True)
class GenerationSettings:
    """How the texts of a task are generated.

    Attributes:
        sampling: of its first text.
        stops: texts that end a text.
        notices: a sentence for each value that has no effect.
    """

    sampling: Sampling
    stops: tuple[str, ...]
    notices: tuple[str, ...]


def read_generation_settings(
    given: Mapping[str, Any], *, eos_ids: tuple[int, ...], num_tokens: int, seed: int
) -> GenerationSettings:
    """The settings of `generation_kwargs`.

    Texts are sampled if `do_sample` says so, or if it is absent and `temperature` is above 0, as in
    lm-evaluation-harness.

    Args:
        given: of a task.
        eos_ids, num_tokens, seed: see `Sampling`.

    Raises:
        ConfigError: a key is unknown, a value is invalid, or two contradict each other.
    """
    unknown = [key for key in given if key not in _KNOWN]
    if unknown:
        raise ConfigError(f"generation_kwargs has {', '.join(map(repr, unknown))}; supported are {', '.join(_KNOWN)}")
    lengths = {key: given[key] for key in _LENGTHS if given.get(key) is not None}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"generation_kwargs has several lengths, {lengths}; keep one")
    if given.get("num_beams", 1) != 1:
        raise ConfigError(f"generation_kwargs has num_beams = {given['num_beams']}: beam search is not supported")
    notices = []
    until = given.get("until") or []
    stops = until if isinstance(until, list) else [until]
    if not all(isinstance(stop, str) for stop in stops):
        raise ConfigError(f"generation_kwargs has until = {until!r}: must be a text or a list of texts")
    if not any(stops):
        notices.append("until has no text, so texts end at an end-of-text token or their maximal length only")
    elif not all(stops):
        notices.append("until has an empty text, which ends nothing")
    numbers = {key: _number(key, given[key]) for key in (*_FOR_SAMPLING, *_FOR_ALL) if given.get(key) is not None}
    do_sample = given.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise ConfigError(f"generation_kwargs has do_sample = {do_sample!r}: must be true or false")
    if do_sample is None:
        do_sample = numbers.get("temperature", 0.0) > 0
    if not do_sample:
        # A temperature of 0 is another way to ask for greedy decoding.
        idle = {key: numbers.pop(key) for key in _FOR_SAMPLING if key in numbers}
        values = [f"{key} = {value:g}" for key, value in idle.items() if value not in (0, _FOR_SAMPLING[key])]
        if values:
            notices.append(f"{' and '.join(values)} has no effect, as decoding is greedy")
    (max_new_tokens,) = set(lengths.values()) or {DEFAULT_NEW_TOKENS}
    if "top_k" in numbers:
        numbers["top_k"] = int(numbers["top_k"])
    sampling = Sampling(
        max_new_tokens=int(_number("max_gen_toks", max_new_tokens)),
        do_sample=do_sample,
        eos_ids=eos_ids,
        num_tokens=num_tokens,
        seed=seed,
        **numbers,  # type: ignore[arg-type]
    )
    problems = sampling.problems()
    if problems:
        raise ConfigError([f"generation_kwargs has {problem}" for problem in problems])
    return GenerationSettings(sampling, tuple(stop for stop in stops if stop), tuple(notices))


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"generation_kwargs has {key} = {value!r}: must be a number")
    return value
