"""Angles of the rotary position embedding, with the usual kinds of context extension.

They are computed from the positions of each forward pass and never stored with the model, so there is no buffer to
materialize, move or save.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.rotary import RotaryTables

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeSettings:
    """Rotary embedding of a model.

    Attributes:
        head_dim: channels that are rotated (even).
        base: the longest wavelength is about 2 pi base positions.
        rope_type: how the context is extended:
            "default": not at all;
            "linear": positions are divided by factor;
            "dynamic": the base grows if a document is longer than `max_positions` (dynamic NTK);
            "llama3": frequencies of long wavelengths are divided by factor, short ones unchanged, with a linear ramp
            between;
            "yarn": likewise, by number of rotations, with a scaled attention temperature
            (https://arxiv.org/abs/2309.00071).
        factor: ratio of the extended to the pretrained context.
        max_positions: length of the pretrained context, in tokens.
        low_freq_factor, high_freq_factor: llama3: ends of the ramp, in rotations within the pretrained context.
        beta_slow, beta_fast: yarn: ends of the ramp, in rotations within the pretrained context.
        truncate: yarn: the ends of the ramp are rounded to whole pairs of channels.
        attention_factor: factor on cosines and sines.
        mscale, mscale_all_dim: yarn with latent attention: coefficients of the temperature, in DeepSeek's form; see
            `score_factor`. 0: none.
        interleaved: pairs are adjacent channels instead of halves.
        fp32: rotate in fp32 instead of the dtype of the model.
    """

    head_dim: int
    base: float = 10000.0
    rope_type: RopeType = "default"
    factor: float = 1.0
    max_positions: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    truncate: bool = True
    attention_factor: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    interleaved: bool = False
    fp32: bool = True

    @property
    def function(self) -> dict[str, object]:
        """The settings that determine the angles, by name: those that this `rope_type` uses, except rounding."""
        names = ["head_dim", "base", "rope_type", "attention_factor", "interleaved"]
        names += {
            "default": [],
            "linear": ["factor"],
            "dynamic": ["factor", "max_positions"],
            "llama3": ["factor", "max_positions", "low_freq_factor", "high_freq_factor"],
            "yarn": ["factor", "max_positions", "beta_slow", "beta_fast", "truncate", "score_factor"],
        }[self.rope_type]
        return {name: getattr(self, name) for name in names}

    @property
    def score_factor(self) -> float:
        """Factor on the attention scores: the square of `yarn_temperature(factor, mscale_all_dim)`.

        Unlike `attention_factor`, it includes channels without rotary embedding.
        """
        return yarn_temperature(self.factor, self.mscale_all_dim) ** 2


def yarn_temperature(factor: float, coefficient: float = 1.0) -> float:
    """`0.1 c ln(factor) + 1` (YaRN, equation 22; DeepSeek's code has the coefficient c)."""
    return 0.1 * coefficient * math.log(factor) + 1.0


def dynamic_frequencies(settings: RopeSettings, lengths: Tensor) -> Tensor:
    """Radians per position for each pair of channels with dynamic NTK: fp32 `[..., D/2]` on the device of `lengths`.

    Args:
        settings: of type "dynamic".
        lengths: tokens of each document, `[...]`; lengths up to `max_positions` give equal frequencies.
    """
    dim = settings.head_dim
    ratio = lengths.to(torch.float64).clamp(min=settings.max_positions) / settings.max_positions
    base = settings.base * (settings.factor * ratio - (settings.factor - 1)) ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=lengths.device) / dim
    return (1.0 / base.unsqueeze(-1) ** exponents).float()


def inverse_frequencies(settings: RopeSettings) -> Tensor:
    """Radians per position for each pair of channels: fp32 `[D/2]` on CPU. For all types except "dynamic"."""
    dim = settings.head_dim
    base = settings.base
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    plain = 1.0 / base**exponents
    if settings.rope_type == "default":
        return plain
    interpolated = plain / settings.factor
    if settings.rope_type == "linear":
        return interpolated
    # Weight of the plain frequency for each pair, from 0 (long wavelength) to 1 (short).
    if settings.rope_type == "llama3":
        rotations = settings.max_positions * plain / (2 * math.pi)
        ramp = (rotations - settings.low_freq_factor) / (settings.high_freq_factor - settings.low_freq_factor)
    else:

        def pair_with(rotations: float) -> float:
            """The (fractional) pair of channels with this many rotations within the pretrained context."""
            return dim * math.log(settings.max_positions / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair_with(settings.beta_fast), pair_with(settings.beta_slow)
        if settings.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low if high != low else 0.001
        ramp = 1 - (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width
    ramp = ramp.clamp(0, 1)
    return interpolated * (1 - ramp) + plain * ramp


class RotaryEmbedding:
    """Computes the `RotaryTables` of a forward pass. Caches the frequencies on each device."""

    def __init__(self, settings: RopeSettings) -> None:
        self.settings = settings
        self._frequencies: dict[torch.device, Tensor] = {}

    def tables(self, position_ids: Tensor, dtype: torch.dtype, varlen: VarlenMetadata | None = None) -> RotaryTables:
        """Cosines and sines of the positions.

        "dynamic" depends on the length of each document, not on packing or padding: the length of a packed document;
        or, if a row is one document, its largest position plus 1 (padding has position 0).

        Args:
            position_ids: int64 `[B, S]`.
            dtype: dtype of the model; the tables have it unless the settings require fp32.
            varlen: documents of a packed row, of which the positions may be a part.
        """
        settings = self.settings
        # Not less precise than a float64 model (a reference in tests).
        dtype = torch.promote_types(dtype, torch.float32) if settings.fp32 else dtype
        if settings.rope_type == "dynamic":
            angles = self._dynamic_angles(position_ids, varlen)
        else:
            angles = position_ids.unsqueeze(-1) * self._static_frequencies(position_ids.device)
        return RotaryTables.of(angles, settings.interleaved, dtype, settings.attention_factor)

    def _static_frequencies(self, device: torch.device) -> Tensor:
        if device not in self._frequencies:
            self._frequencies[device] = inverse_frequencies(self.settings).to(device)
        return self._frequencies[device]

    def _dynamic_angles(self, position_ids: Tensor, varlen: VarlenMetadata | None) -> Tensor:
        if varlen is None:
            frequencies = dynamic_frequencies(self.settings, position_ids.amax(dim=1, keepdim=True) + 1)
            return position_ids.unsqueeze(-1) * frequencies
        # Computed on the host, which has the lengths; one copy for all documents.
        frequencies = dynamic_frequencies(self.settings, torch.from_numpy(np.asarray(varlen.lengths)))
        if varlen.token_indices is not None:
            documents = torch.searchsorted(varlen.cu_seqlens[1:], varlen.token_indices, right=True)
            return position_ids.unsqueeze(-1) * frequencies.to(position_ids.device, non_blocking=True)[documents]
        angles = [
            positions.unsqueeze(-1) * document_frequencies
            for positions, document_frequencies in zip(
                position_ids.split(varlen.lengths, dim=1),
                frequencies.to(position_ids.device, non_blocking=True),
                strict=True,
            )
        ]
        return torch.cat(angles, dim=1)
