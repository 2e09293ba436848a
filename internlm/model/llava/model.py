"""LLaVA: a decoder that reads pictures, whose features take the place of the embeddings of placeholders.

Shapes: B sequences, S tokens, h hidden size, N pictures of H x W pixels with P features each.
Source: Liu et al. 2023, https://arxiv.org/abs/2304.08485 and https://arxiv.org/abs/2310.03744.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.model.architecture import Architecture
from internlm.model.decoder import Decoder
from internlm.model.llava.projector import make_projector
from internlm.model.llava.vision_tower import VisionTower, tower_config
from internlm.model.modules.cache import CachedRows
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.roles import Role
from internlm.utils.errors import ConfigError

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig

IMAGE_FEATURES = "image_features"
"""Name, in `extra`, of the index of the image feature of each token."""


class Llava(Decoder):
    """A decoder with a vision tower and a projector, which are part of the first pipeline stage.

    Attributes:
        vision: computes features with `vision_tower`.
        vision_tower: the module of transformers.
        vision_proj: see `make_projector`.
        projector_type: its kind.
        gather_features: features of this rank's pictures, `[N' P, h]` -> of all pictures of the micro-batch; set where
            several ranks share a sample.
    """

    def __init__(self, architecture: Architecture, config: ModelConfig) -> None:
        super().__init__(architecture)
        assert config.vit_cfg is not None and config.vision_proj_cfg is not None
        self.roles = {**self.roles, "vision_tower.*": Role.PER_IMAGE, "vision_proj.*": Role.PER_IMAGE}
        self.vision = VisionTower(tower_config(config.vit_cfg), config.vit_cfg)
        self.vision.recompute(config.checkpoint, config.checkpoint_save_policy)
        projector, widths = config.vision_proj_cfg, (self.vision.width, architecture.hidden_size)
        for name, width in zip(("mm_hidden_size", "hidden_size"), widths, strict=True):
            stated = getattr(projector, name)
            if stated not in (None, width):
                owner = "vision tower" if name == "mm_hidden_size" else "language model"
                raise ConfigError(
                    f"model.vision_proj_cfg.{name} = {stated}, but the {owner} has width {width}; leave the key out"
                )
        self.projector_type = projector.mm_projector_type
        self._projector = self.projector_type, *widths
        self.vision_tower = self.vision.build(architecture.dtype)
        self.vision_proj = make_projector(*self._projector, architecture.dtype)
        self.gather_features: Callable[[Tensor], Tensor] = lambda features: features

    def keep_stage(self, layers: range, *, is_first: bool, is_last: bool) -> None:
        super().keep_stage(layers, is_first=is_first, is_last=is_last)
        if not is_first:
            del self.vision_tower, self.vision_proj

    def vision_weights(self) -> dict[str, Tensor]:
        """The weights of tower and projector, whole and on the meta device, also in a later pipeline stage."""
        with torch.device("meta"):
            modules = {
                "vision_tower": self.vision.build(self.architecture.dtype),
                "vision_proj": make_projector(*self._projector, self.architecture.dtype),
            }
        return {
            f"{part}.{name}": weight for part, module in modules.items() for name, weight in module.named_parameters()
        }

    @property
    def image_function(self) -> dict[str, Any]:
        """What determines the features of a picture, besides the weights."""
        return {**self.vision.function, "projector": self._projector}

    def forward(
        self,
        inputs: Tensor,
        position_ids: Tensor,
        varlen: VarlenMetadata | None = None,
        cache: CachedRows | None = None,
        later_ids: Tensor | None = None,
        *,
        images: Tensor | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm; see `Decoder.forward`.

        Without pictures, a blank one is encoded and not used, so that every rank runs the same collectives and every
        parameter receives a gradient; only generation, which has a cache, leaves it out.

        Args:
            inputs, position_ids, varlen, cache, later_ids: see `Decoder.forward`.
            images: this rank's pictures, float `[N', 3, H, W]`; None: no picture in the micro-batch.
            extra: "image_features", int64 `[B, S']`: for the tokens of this rank's residual stream, the index of their
                image feature among all of the micro-batch, n * P + p; negative for text.

        Raises:
            DataError: the pictures do not have the size that the vision tower takes.
            ValueError: there are pictures, but no indices of their features.
        """
        if not self.is_first:
            return self.run(inputs, position_ids, varlen, cache, later_ids)
        indices = (extra or {}).get(IMAGE_FEATURES)
        if images is not None and indices is None:
            raise ValueError(f"pictures without extra['{IMAGE_FEATURES}'], which says where they belong")
        embedded = self.tok_embeddings(inputs)
        if images is not None or cache is None:
            embedded = merge(embedded, self.encode(images), indices)
        return self.run(self.to_stream(embedded), position_ids, varlen, cache, later_ids)

    def encode(self, images: Tensor | None) -> Tensor:
        """This rank's pictures `[N', 3, H, W]` -> features of all pictures of the micro-batch, `[N P, h]`."""
        if images is None:
            images = self.vision.blank(next(self.vision_tower.parameters()).device)
        states = self.vision.features(self.vision_tower, images.to(self.architecture.dtype))
        return self.gather_features(self.vision_proj(states).flatten(0, 1))


def merge(embedded: Tensor, features: Tensor, indices: Tensor | None) -> Tensor:
    """Put image features in the place of placeholders.

    Args:
        embedded: embeddings of tokens, `[B, S, h]`.
        features: `[N P, h]`.
        indices: int64 `[B, S]`, row of `features` for each token, negative for text; None: all are text.
    """
    if indices is None:
        indices = torch.full(embedded.shape[:2], -1, device=embedded.device)
    is_image = (indices >= 0).unsqueeze(-1)
    return torch.where(is_image, F.embedding(indices.clamp(min=0), features), embedded)
