"""Compares the logits of two implementations of a model, with a tolerance that follows from rounding errors.

How far rounding moves the logits of a model depends on its weights, so it is measured: by the difference between our
own logits in a dtype and in float64. Another implementation rounds in other places, and may be off as far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from internlm.checkpoint.load_model import load_model_for_inference
from internlm.model.huggingface.weight_names import SELECTION_BIAS
from internlm.utils.storage import StoragePath

ROUNDING_FACTOR = 8
"""By how many times our own rounding error another implementation may differ. A misplaced weight gives 1e3 and more."""

_LENGTHS = (1, 7, 32)
_LONGEST = 128
_ROBUST_QUANTILE = 0.9


@dataclass(frozen=True)
class LogitComparison:
    """Two implementations on the same tokens.

    Attributes:
        num_tokens: positions that were compared.
        largest: largest absolute difference of a logit.
        relative: the same, divided by the largest absolute logit.
        agreement: share of the positions with the same most likely next token.
        judged: the difference that the tolerance is for: `largest`, or a quantile of it over tokens.
        tolerance: for `judged`.
        place: the first sequence and position beyond the tolerance; empty if there is none.
    """

    num_tokens: int
    largest: float
    relative: float
    agreement: float
    judged: float
    tolerance: float
    place: str

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN never is."""
        return self.judged <= self.tolerance

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.1e} ({self.relative:.1e} of the largest logit), same next token for "
            f"{self.agreement:.2%} of {self.num_tokens:,} tokens; {self.judged:.1e} against a tolerance of "
            f"{self.tolerance:.1e}"
        )


def longest_probe(context: int, windows: Sequence[int | None]) -> int:
    """Length of the longest probe: beyond the smallest window if that takes no more than 512 tokens."""
    smallest = min((window for window in windows if window is not None), default=0)
    wanted = 2 * smallest if _LONGEST < 2 * smallest <= 4 * _LONGEST else _LONGEST
    return max(1, min(wanted, context))


def probe_sequences(vocab_size: int, longest: int, avoided: int | None = None) -> list[Tensor]:
    """Sequences of random ids of the whole vocabulary, int64 `[S]`; always the same.

    Args:
        vocab_size: of the model; its last id is among the tokens.
        longest: length of the longest sequence.
        avoided: an id that does not stand for a token, such as the placeholder of a picture.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = sorted({min(length, longest) for length in (*_LENGTHS, longest)})
    sequences = [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]
    sequences[-1][-1] = vocab_size - 1
    if avoided is not None:
        sequences = [sequence.masked_fill(sequence == avoided, avoided - 1 if avoided else 1) for sequence in sequences]
    return sequences


@torch.inference_mode()
def our_logits(
    checkpoint: StoragePath,
    sequences: Sequence[Tensor],
    dtype: torch.dtype | None,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """Logits of the model of a checkpoint on the CPU, `[S, V]` for each sequence; the model is freed afterwards.

    Args:
        checkpoint: holds the model.
        sequences: token ids, `[S]` each.
        dtype: in which the model computes; None: that of the run.
        change: name and value of a weight -> the value to compute with.
    """
    model, _ = load_model_for_inference(checkpoint, dtype=dtype)
    if change is not None:
        for name, parameter in model.named_parameters():
            parameter.copy_(change(name, parameter))
    return [_logits(model, sequence) for sequence in sequences]


def rounded_to(dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    """Rounds every weight that an export rounds to `dtype`, for `our_logits`."""

    def change(name: str, weight: Tensor) -> Tensor:
        return weight if name.endswith(("selection_bias", SELECTION_BIAS)) else weight.to(dtype)

    return change


def compare_logits(
    theirs: Sequence[Tensor],
    ours: Sequence[Tensor],
    exact: Sequence[Tensor],
    *,
    robust: bool = False,
    additional: float = 0.0,
) -> LogitComparison:
    """Compare logits, `[S, V]` for each sequence.

    Args:
        theirs: of the other implementation, in some dtype.
        ours: our own in the same dtype.
        exact: our own in float64.
        robust: judge the difference of 9 tokens in 10 instead of all: a rounding error can send a token to another
            expert.
        additional: relative error of the logits that the other implementation has by design.
    """
    differences = [_by_token(one, two) for one, two in zip(theirs, ours, strict=True)]
    noise = [_by_token(one, two) for one, two in zip(ours, exact, strict=True)]
    scale = max(float(logits.abs().max()) for logits in exact)
    # Angles of rotary embeddings are in fp32 everywhere, with an error of the position times epsilon.
    angles = max(len(sequence) for sequence in exact) * torch.finfo(torch.float32).eps
    tolerance = ROUNDING_FACTOR * _size(noise, robust) + (angles + additional) * scale
    same = [one.argmax(-1) == two.argmax(-1) for one, two in zip(theirs, ours, strict=True)]
    largest = _size(differences, robust=False)
    return LogitComparison(
        num_tokens=sum(map(len, differences)),
        largest=largest,
        relative=largest / max(scale, 1e-30),
        agreement=float(torch.cat(same).double().mean()),
        judged=_size(differences, robust),
        tolerance=tolerance,
        place=_first_beyond(differences, tolerance),
    )


def _logits(model: nn.Module, sequence: Tensor) -> Tensor:
    positions = torch.arange(len(sequence))
    logits: Tensor = model.logits(model(sequence[None], positions[None]))[0]  # type: ignore[operator]
    return logits if logits.dtype == torch.float64 else logits.float()


def _by_token(one: Tensor, two: Tensor) -> Tensor:
    """The largest difference of each token, `[S]`; NaN where a logit is."""
    return (one - two).abs().amax(-1)


def _size(differences: Sequence[Tensor], robust: bool) -> float:
    values = torch.cat(list(differences)).double()
    return float(values.quantile(_ROBUST_QUANTILE) if robust else values.max())


def _first_beyond(differences: Sequence[Tensor], tolerance: float) -> str:
    for sequence in differences:
        beyond = (~(sequence <= tolerance)).nonzero()
        if len(beyond):
            return f"position {int(beyond[0])} of a sequence of {len(sequence)} tokens"
    return ""
