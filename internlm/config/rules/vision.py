"""Rules on models that read pictures, and on documents with pictures."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config.image_tokens import tokens_per_image
from internlm.config.problem import Problem
from internlm.config.schema import Config


def vision_model(config: Config, world_size: int) -> Iterator[Problem]:
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


def documents_with_pictures(config: Config, world_size: int) -> Iterator[Problem]:
    """Pictures need a model that reads them, a placeholder, sizes that fit, and a packing that does not cut them."""
    data = config.data
    if not data.is_multimodal:
        for key in _given_to_sources(config):
            yield Problem(
                (key.partition("[")[0], "data.is_multimodal"), f"{key} needs data.is_multimodal = True; remove it"
            )
        return
    needs = "data.is_multimodal = True needs"
    if config.model_type != "LLAVA":
        yield Problem(
            ("data.is_multimodal", "model_type"),
            f"{needs} model_type = 'LLAVA', and it is {config.model_type!r}, which reads no pictures; remove it",
        )
    values = {
        "model.image_token_id": (config.model.image_token_id, "the token that stands for a part of a picture"),
        "data.image_size": (data.image_size, "the side of a picture in pixels, such as 336"),
        "data.patch_size": (data.patch_size, "the side of a patch of the vision tower in pixels, such as 14"),
    }
    missing = [key for key, (value, _) in values.items() if value is None]
    for key in missing:
        yield Problem(("data.is_multimodal", key), f"{needs} {key}: {values[key][1]}")
    yield from _training(config)
    if not missing:
        yield from _sizes(config)


def _sizes(config: Config) -> Iterator[Problem]:
    data, token = config.data, config.model.image_token_id
    assert data.image_size is not None and data.patch_size is not None and token is not None
    if token < 1:
        yield Problem(("model.image_token_id",), f"model.image_token_id = {token} must be at least 1: 0 is padding")
    if data.image_size % data.patch_size:
        yield Problem(
            ("data.image_size", "data.patch_size"),
            f"data.image_size = {data.image_size} must be a multiple of data.patch_size = {data.patch_size}",
        )
    vision = config.model.vit_cfg
    tower = {} if vision is None or vision.config is None else vision.config
    for name, value in (("image_size", data.image_size), ("patch_size", data.patch_size)):
        if name in tower and tower[name] != value:
            yield Problem(
                (f"data.{name}", "model.vit_cfg.config"),
                f"data.{name} = {value} differs from {tower[name]} in model.vit_cfg.config; make them equal",
            )
    if not data.image_size % data.patch_size and tokens_per_image(config) >= data.seq_len:
        yield Problem(
            ("data.seq_len", "data.image_size", "data.patch_size"),
            f"data.seq_len = {data.seq_len} has no room for a picture, which is {tokens_per_image(config)} tokens, and "
            "text; raise data.seq_len",
        )


def _training(config: Config) -> Iterator[Problem]:
    data = config.data
    types = {data.type, *(entry.type for entry in data.blend if entry.type is not None)}
    if data.type == "mocked":
        yield Problem(
            ("data.is_multimodal", "data.type"),
            "data.type = 'mocked': recorded batches have no pictures; remove data.is_multimodal",
        )
    has_files = data.train_folder is not None or bool(data.blend)
    if has_files and "tokenized" in types and data.packing in ("cut", "pack_sample_into_one"):
        mask = " and data.document_mask = False" if data.packing == "pack_sample_into_one" else ""
        yield Problem(
            ("data.packing", "data.is_multimodal"),
            f"data.packing = {data.packing!r} would cut pictures in tokenized files; set data.packing = 'best_fit'"
            f"{mask}",
        )
    if data.fim is not None:
        yield Problem(
            ("data.fim", "data.is_multimodal"),
            "data.fim would move the text of a picture away from it; remove data.fim, or data.is_multimodal",
        )
    for key, folder in {"data.image_folder": data.image_folder, **_folders_of_sources(config)}.items():
        if folder is not None and "://" in folder.removeprefix("local:"):
            yield Problem(
                (key.partition("[")[0],),
                f"{key} = {folder!r}: pictures are read from a folder on a disk; copy them, or use parquet files with "
                "the bytes of pictures, which may be in an object store",
            )


def _given_to_sources(config: Config) -> Iterator[str]:
    """The keys of pictures that sources of a blend and validation sets have."""
    for name in ("image_folder", "image_column"):
        for number, entry in enumerate(config.data.blend):
            if getattr(entry, name) is not None:
                yield f"data.blend[{number}].{name}"
        if isinstance(config.data.valid_folder, dict):
            for set_name, each in config.data.valid_folder.items():
                if name in each:
                    yield f"data.valid_folder[{set_name!r}].{name}"


def _folders_of_sources(config: Config) -> dict[str, str | None]:
    return {f"data.blend[{number}].image_folder": entry.image_folder for number, entry in enumerate(config.data.blend)}
