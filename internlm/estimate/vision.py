"""What a picture costs in a vision tower and its projector: FLOPs, and bytes saved for backward.

Only GEMMs count, as in `internlm.estimate.flops`. How many pictures a micro-batch has is up to the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

_FLOAT32 = 4


@dataclass(frozen=True)
class VisionDimensions:
    """Dimensions of a tower whose layers have two norms, attention and two matrices, up to the selected hidden state.

    Attributes:
        num_layers: computed layers.
        width: of the tower, v.
        intermediate_size: width of its feed-forward networks, f.
        num_heads: heads of its attention.
        num_tokens: tokens of a picture in the tower, T, with the class token.
        num_patches: patches of a picture.
        patch_values: numbers of a patch: three channels of its pixels.
        num_features: features of a picture, P.
        has_norm_before_layers: whether the embeddings of patches are normalized, as in CLIP.
        num_saved_by_activation: tensors of width f that the activation function and the GEMM behind it save.
        hidden_size: of the decoder, h.
        num_projector_layers: linear layers of the projector, with an activation function between them.
        itemsize: bytes of an activation.
        trains_tower: a backward pass runs through the tower.
        trains_projector: a backward pass runs through the projector.
    """

    num_layers: int
    width: int
    intermediate_size: int
    num_heads: int
    num_tokens: int
    num_patches: int
    patch_values: int
    num_features: int
    has_norm_before_layers: bool
    num_saved_by_activation: int
    hidden_size: int
    num_projector_layers: int
    itemsize: int
    trains_tower: bool
    trains_projector: bool

    @property
    def tower_flops(self) -> float:
        """Model FLOPs of the tower for a picture: those of the forward pass, thrice where the tower is trained."""
        v = self.width
        gemms = self.num_patches * self.patch_values * v
        gemms += self.num_layers * self.num_tokens * (4 * v**2 + 2 * v * self.intermediate_size)
        # Scores, and the sum of values; every token attends to every other.
        gemms += self.num_layers * 2 * self.num_tokens**2 * v
        return 2.0 * gemms * (3 if self.trains_tower else 1)

    @property
    def projector_flops(self) -> float:
        """The same of the projector."""
        widths = [self.width, *[self.hidden_size] * self.num_projector_layers]
        gemms = self.num_features * sum(one * other for one, other in pairwise(widths))
        return 2.0 * gemms * (3 if self.trains_projector else 1)

    @property
    def saved_bytes(self) -> float:
        """Bytes that a picture saves for backward, without recomputation."""
        return self._saved_by_tower + self._saved_by_projector

    @property
    def _saved_by_tower(self) -> float:
        if not self.trains_tower:
            return 0.0
        # A layer: inputs and outputs of two norms, of which the outputs are inputs of GEMMs; queries, keys, values and
        # the sum of values; in fp32 two numbers of each norm, and one of the softmax of each head.
        values = 8 * self.width + self.num_saved_by_activation * self.intermediate_size
        layer = self.num_tokens * (values * self.itemsize + (4 + self.num_heads) * _FLOAT32)
        before = self.num_patches * self.patch_values * self.itemsize
        if self.has_norm_before_layers:
            before += self.num_tokens * (self.width * self.itemsize + 2 * _FLOAT32)
        return self.num_layers * layer + before

    @property
    def _saved_by_projector(self) -> float:
        if not self.trains_projector or not self.num_projector_layers:
            return 0.0
        values = self.width + 2 * (self.num_projector_layers - 1) * self.hidden_size
        return float(self.num_features * values * self.itemsize)
