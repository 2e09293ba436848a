"""Builds what reads the pictures of a run from a config."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

from internlm.config.image_tokens import tokens_per_image
from internlm.config.schema import Config
from internlm.data.images.decoding import check_pillow
from internlm.data.images.loading import ImageLoader
from internlm.data.images.processor import PREPROCESSOR_CONFIG, Fit, ImageProcessor, read_processor
from internlm.data.images.settings import ImageSettings
from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


def image_settings(config: Config) -> ImageSettings | None:
    """The settings of placeholders; None without data.is_multimodal.

    Raises:
        ConfigError: data.image_folder is not a folder.
    """
    data = config.data
    if not data.is_multimodal:
        return None
    folder = None if data.image_folder is None else Path(data.image_folder).absolute()
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"data.image_folder = {data.image_folder!r}: no such folder")
    assert config.model.image_token_id is not None
    return ImageSettings(config.model.image_token_id, tokens_per_image(config), data.seq_len, folder, data.image_column)


def image_loader(config: Config) -> ImageLoader | None:
    """The reader of pictures; None without data.is_multimodal.

    Raises:
        ConfigError: Pillow is missing, or the file of data.image_processor_path does not fit.
    """
    settings = image_settings(config)
    if settings is None:
        return None
    check_pillow()
    return ImageLoader(settings, image_processor(config), config.data.on_bad_data == "skip")


def image_processor(config: Config) -> ImageProcessor:
    """What makes pixels of pictures, of a config with data.image_size.

    Raises:
        ConfigError: the file of data.image_processor_path does not fit.
    """
    data = config.data
    assert data.image_size is not None
    path, vision = data.image_processor_path, config.model.vit_cfg
    tower = None if vision is None else vision.mm_vision_tower
    if path is None and tower is not None and (Path(tower) / PREPROCESSOR_CONFIG).is_file():
        path = tower
    return _read_processor(path, data.image_size, data.image_fit)


@functools.cache
def _read_processor(path: str | None, size: int, fit: Fit | None) -> ImageProcessor:
    """The processor of a path, logged once in a process."""
    processor = ImageProcessor(size) if path is None else read_processor(Path(path), size)
    if fit is not None:
        processor = replace(processor, fit=fit)
    source = "CLIP does" if path is None else f"{path} says"
    logger.info("pictures: %d x %d pixels, fitted by '%s' and normalized as %s", size, size, processor.fit, source)
    return processor
