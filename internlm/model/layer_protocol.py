"""Protocols of a model and its layers for compilation, recomputation, offloading and the activation budget.

`internlm.model.decoder` implements them, and any registered model may. Code outside of a model never depends on the
class of its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from internlm.model.offload import Offloading
from internlm.model.recompute import SavePolicy, TensorStore

if TYPE_CHECKING:
    from internlm.model.architecture import Architecture


@runtime_checkable
class RecomputableLayer(Protocol):
    """A layer that can recompute its activations; its `forward` calls `recomputed(self.compute, ...)`.

    Attributes:
        save_policy: what is saved for backward. Must not change after the layer is compiled.
        store: holds the results that the policy saves; None: they stay on the device. Must not change after the layer
            is compiled.
    """

    save_policy: SavePolicy
    store: TensorStore | None

    def compute(self, hidden: Tensor, *inputs: Any) -> Tensor:
        """The layer without recomputation; compiled as a unit if linear layers communicate."""


@runtime_checkable
class LayeredModel(Protocol):
    """A model or pipeline stage whose forward pass runs numbered layers with `run_layers`.

    Attributes:
        offloading: moves activations to host memory; None: they stay on the device. May be set before training.
    """

    offloading: Offloading | None

    def numbered_layers(self) -> Mapping[int, RecomputableLayer]:
        """The layers by their number in the whole model, in order."""


@runtime_checkable
class DescribedModel(Protocol):
    """A model whose layers have the dimensions of an `Architecture`, so that their activations can be estimated.

    Attributes:
        architecture: of the whole model.
    """

    architecture: Architecture


@runtime_checkable
class ImageModel(Protocol):
    """A model that reads pictures; ranks that share a sample encode a part of them each.

    Attributes:
        gather_features: features of this rank's pictures, `[N' P, h]` -> of all pictures of the sample, `[N P, h]`.
    """

    gather_features: Callable[[Tensor], Tensor]


@runtime_checkable
class PositionedModel(Protocol):
    """A model that computes rotary angles once for all layers, from the positions of the tokens in its residual stream.

    Attributes:
        own_tokens: values of all tokens, `[B, S, ...]` -> of those in this rank's residual stream, `[B, S', ...]`.
    """

    own_tokens: Callable[[Tensor], Tensor]


@runtime_checkable
class MultiTokenModel(Protocol):
    """A model or pipeline stage that may hold layers that predict later tokens, behind its other layers."""

    def later_layers(self) -> Mapping[int, RecomputableLayer]:
        """These layers by their number, in order; those of the model come before."""


def run_layers(
    layers: Iterable[tuple[int, nn.Module]], hidden: Tensor, *inputs: Any, offloading: Offloading | None = None
) -> Tensor:
    """Run layers one after another on the residual stream.

    Args:
        layers: (number, layer); each is called as `layer(hidden, *inputs)`.
        hidden: residual stream, `[B, S, h]`.
        inputs: further inputs, the same for all layers.
        offloading: of the model.

    Returns:
        Residual stream, `[B, S, h]`.
    """
    if offloading is not None:
        offloading.begin_pass()
    for number, layer in layers:
        with nullcontext() if offloading is None else offloading.layer(number):
            hidden = layer(hidden, *inputs)
    return hidden
