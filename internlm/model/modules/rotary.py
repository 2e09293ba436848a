"""Angles of the rotary position embedding: plain, and stretched to longer contexts.

Computed from the positions of each forward pass and never stored with the model: there is no buffer to materialise,
to move or to save.
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
        head_dim: channels that are turned (even).
        base: the longest wavelength is about 2 pi base positions.
        rope_type: how angles are stretched beyond the trained context:
            "default": not at all;
            "linear": positions divided by factor;
            "dynamic": a base that grows once a document is longer than `max_positions` (dynamic NTK);
            "llama3": long wavelengths divided by factor, short ones kept, a ramp between;
            "yarn": the same by number of turns, and warmer attention (https://arxiv.org/abs/2309.00071).
        factor: by how much the context is stretched.
        max_positions: positions of the pretrained context.
        low_freq_factor, high_freq_factor: llama3: the ramp, in turns within the pretrained context.
        beta_slow, beta_fast: yarn: the ramp, in turns within the pretrained context.
        attention_factor: multiplies cosines and sines.
        interleaved: pairs are adjacent channels instead of halves.
        fp32: turn in fp32 instead of in the dtype of the model.
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
    attention_factor: float = 1.0
    interleaved: bool = False
    fp32: bool = True

    @property
    def function(self) -> dict[str, object]:
        """What the angles follow from, by name: of the settings those that this `rope_type` reads, rounding aside."""
        names = ["head_dim", "base", "rope_type", "attention_factor", "interleaved"]
        names += {
            "default": [],
            "linear": ["factor"],
            "dynamic": ["factor", "max_positions"],
            "llama3": ["factor", "max_positions", "low_freq_factor", "high_freq_factor"],
            "yarn": ["factor", "max_positions", "beta_slow", "beta_fast"],
        }[self.rope_type]
        return {name: getattr(self, name) for name in names}


def dynamic_frequencies(settings: RopeSettings, lengths: Tensor) -> Tensor:
    """Radians a position for each pair of channels under dynamic NTK: fp32 `[..., D/2]` on the device of `lengths`.

    Args:
        lengths: tokens of each document, `[...]`; up to `max_positions` it does not matter.
    """
    dim = settings.head_dim
    ratio = lengths.to(torch.float64).clamp(min=settings.max_positions) / settings.max_positions
    base = settings.base * (settings.factor * ratio - (settings.factor - 1)) ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=lengths.device) / dim
    return (1.0 / base.unsqueeze(-1) ** exponents).float()


def inverse_frequencies(settings: RopeSettings) -> Tensor:
    """Radians a position for each pair of channels: fp32 `[D/2]` on CPU. For all types but "dynamic"."""
    dim = settings.head_dim
    base = settings.base
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    plain = 1.0 / base**exponents
    if settings.rope_type == "default":
        return plain
    stretched = plain / settings.factor
    if settings.rope_type == "linear":
        return stretched
    # Share of each channel pair that keeps its plain frequency, from 0 (long wavelength) to 1 (short).
    if settings.rope_type == "llama3":
        turns = settings.max_positions * plain / (2 * math.pi)
        kept = (turns - settings.low_freq_factor) / (settings.high_freq_factor - settings.low_freq_factor)
    else:

        def pair_with(turns: float) -> float:
            """The (fractional) pair of channels that makes this many turns within the pretrained context."""
            return dim * math.log(settings.max_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = math.floor(pair_with(settings.beta_fast)), math.ceil(pair_with(settings.beta_slow))
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low if high != low else 0.001
        kept = 1 - (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width
    kept = kept.clamp(0, 1)
    return stretched * (1 - kept) + plain * kept


class RotaryEmbedding:
    """Makes the `RotaryTables` of a forward pass. Keeps the frequencies of each device it was used on."""

    def __init__(self, settings: RopeSettings) -> None:
        self.settings = settings
        self._frequencies: dict[torch.device, Tensor] = {}

    def tables(self, position_ids: Tensor, dtype: torch.dtype, varlen: VarlenMetadata | None = None) -> RotaryTables:
        """Cosines and sines of the positions.

        "dynamic" stretches each document by its own length, whatever it is packed or padded with: that of a segment,
        or, where a row is one document, its largest position plus 1 (padding has position 0).

        Args:
            position_ids: `[B, S]`.
            dtype: dtype of the model; that of the arithmetic unless the settings ask for fp32.
            varlen: documents of a packed row.
        """
        settings = self.settings
        # A float64 model (a reference in tests) keeps its precision.
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
        # On the host, which knows the lengths; one copy for all of them.
        frequencies = dynamic_frequencies(self.settings, torch.from_numpy(np.asarray(varlen.lengths)))
        pieces = [
            positions.unsqueeze(-1) * own
            for positions, own in zip(
                position_ids.split(varlen.lengths, dim=1),
                frequencies.to(position_ids.device, non_blocking=True),
                strict=True,
            )
        ]
        return torch.cat(pieces, dim=1)
