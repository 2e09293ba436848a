"""What a class of transformers does to the logits of its head, in a form that the fused loss can compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadForm:
    """Logits c tanh(l / c) with l = factor * (W x + b).

    Attributes:
        factor: of the logits, applied to the hidden states.
        has_bias: whether there is b. It is a further column of W, and 1 a further channel of x.
        softcap: c; None: the logits are l.
    """

    factor: float = 1.0
    has_bias: bool = False
    softcap: float | None = None

    def prepare(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., h]` -> input of the product with `weight`."""
        if self.has_bias:
            hidden = torch.cat([hidden, hidden.new_ones(*hidden.shape[:-1], 1)], dim=-1)
        return hidden if self.factor == 1.0 else hidden * self.factor

    def weight(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[V, h]` and `[V]` -> the matrix of the product."""
        return weight if bias is None else torch.cat([weight, bias.unsqueeze(-1)], dim=-1)


def head_form(hf_config: Any, *, has_bias: bool) -> HeadForm:
    """The form that the config of a class states. Before a run, logits are compared with those of the class."""
    divisor = getattr(hf_config, "logits_scaling", None)
    multiplier = getattr(hf_config, "logit_scale", None)
    factor = 1.0 / divisor if divisor else 1.0
    factor *= multiplier if isinstance(multiplier, int | float) else 1.0
    return HeadForm(factor, has_bias, getattr(hf_config, "final_logit_softcapping", None))
