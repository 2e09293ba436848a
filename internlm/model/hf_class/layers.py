"""Layers of Hugging Face classes that can be recomputed, offloaded, compiled, and left out of a pipeline stage."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from internlm.model.hf_class.attention import Documents
from internlm.model.offload import Offloading
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.recompute import SavePolicy, TensorStore, recomputed


class RecomputableMixin:
    """Put in front of the class of a layer: its forward pass recomputes what the save policy leaves out.

    Attributes:
        number: of the layer in the model.
        documents: of the model.
        offloading: of the model.
        has_saved_operators: see `recomputed`.
        save_policy, store: see `internlm.model.layer_protocol.RecomputableLayer`.
    """

    number: int
    documents: Documents
    offloading: Offloading | None = None
    has_saved_operators: bool = False
    save_policy: SavePolicy = "everything"
    store: TensorStore | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own."""
        run = recomputed(self.compute, self.save_policy, self.store, has_saved_operators=self.has_saved_operators)
        with nullcontext() if self.offloading is None else self.offloading.layer(self.number):
            return run(hidden_states, self.documents.varlen, args, kwargs)

    def compute(
        self, hidden: Tensor, varlen: VarlenMetadata | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The layer without recomputation. A pass that recomputes it may belong to another micro-batch by then."""
        self.documents.varlen = varlen
        return super().forward(hidden, *args, **kwargs)  # type: ignore[misc]


def make_recomputable(layer: nn.Module, number: int, documents: Documents) -> None:
    """Change the class of a layer of transformers to one with `RecomputableMixin`; names of weights stay."""
    kind = type(layer)
    layer.__class__ = type(f"Recomputable{kind.__name__}", (RecomputableMixin, kind), {})
    layer.number, layer.documents = number, documents  # type: ignore[assignment]


class Absent(nn.Module):
    """Takes the place of a layer or norm that another pipeline stage has; returns its input."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The residual stream, unchanged."""
        return hidden_states
