"""What compilation, recomputation, offloading and the activation budget ask of a model and of its layers.

`internlm.model.decoder` fulfils these protocols; so may any registered model. Nothing outside a model asks for the
class of its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from internlm.model.offload import Offloading
from internlm.model.recompute import SavePolicy, TensorStore

if TYPE_CHECKING:
    from internlm.model.architecture import Architecture


@runtime_checkable
class RecomputableLayer(Protocol):
    """A layer that can recompute its activations; `forward` is `recomputed(self.compute, ...)`.

    Attributes:
        save_policy: what is saved for backward. Constant once the layer is compiled.
        store: where results that the policy saves are held; None: on the device. Constant once the layer is compiled.
    """

    save_policy: SavePolicy
    store: TensorStore | None

    def compute(self, hidden: Tensor, *inputs: Any) -> Tensor:
        """The layer without recomputation; compiled as a whole where linear layers communicate."""


@runtime_checkable
class LayeredModel(Protocol):
    """A model, or a stage of one, whose forward pass goes through numbered layers with `run_layers`.

    Attributes:
        offloading: moves activations to host memory; None: they stay. May be set before training.
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


def run_layers(
    layers: Iterable[tuple[int, nn.Module]], hidden: Tensor, *inputs: Any, offloading: Offloading | None = None
) -> Tensor:
    """The residual stream through layers, one after the other.

    Args:
        layers: (number, layer); each is called as `layer(hidden, *inputs)`.
        hidden: `[B, S, h]`.
        inputs: the same for all layers.
        offloading: of the model.

    Returns:
        `[B, S, h]`.
    """
    if offloading is not None:
        offloading.begin_pass()
    for number, layer in layers:
        with nullcontext() if offloading is None else offloading.layer(number):
            hidden = layer(hidden, *inputs)
    return hidden
