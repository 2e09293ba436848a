"""Rules on models that read pictures."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.schema import Config


def pictures(config: Config, world_size: int) -> Iterator[Problem]:
    """A LLaVA model needs its tower, projector and placeholder; other models read none of them."""
    model = config.model
    sections = ("vit_cfg", "vision_proj_cfg")
    if config.model_type != "LLAVA":
        for name in (*sections, "image_token_id"):
            value = getattr(model, name)
            # InternEvo's configs of other families may have empty ones.
            if value is not None and (name == "image_token_id" or value.model_fields_set):
                yield Problem(
                    (f"model.{name}", "model_type"),
                    f"model.{name} has no effect on model_type = {config.model_type!r}; set 'LLAVA', or leave it out",
                )
        return
    for name in (*sections, "image_token_id"):
        if getattr(model, name) is None:
            yield Problem(
                (f"model.{name}",), f"model.{name} = None: model_type = 'LLAVA' needs it; see doc/multimodal.md"
            )
    if model.vit_cfg is not None and model.vit_cfg.mm_vision_tower is None and model.vit_cfg.config is None:
        yield Problem(
            ("model.vit_cfg.mm_vision_tower", "model.vit_cfg.config"),
            "model.vit_cfg: give mm_vision_tower, the folder of a CLIP or SigLIP model, or config, its configuration",
        )
    if model.num_nextn_predict_layers:
        yield Problem(
            ("model.num_nextn_predict_layers", "model_type"),
            f"model.num_nextn_predict_layers = {model.num_nextn_predict_layers} does not work with model_type = "
            "'LLAVA': these layers read the embeddings of later tokens, which pictures do not have; leave it out",
        )
