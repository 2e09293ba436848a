"""Pictures in prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from internlm.apis.engine import Prompt
from internlm.config.schema import Config
from internlm.convert.hf_folder import HF_FILES
from internlm.data.images.decoding import check_pillow, decode_image
from internlm.data.images.placeholder_tokenizer import PlaceholderTokenizer
from internlm.data.images.processor import PREPROCESSOR_CONFIG, ImageProcessor, read_processor
from internlm.data.images.settings import IMAGE_MARKER, ImageSettings
from internlm.data.packing.image_placeholders import IMAGE_FEATURES, image_feature_indices
from internlm.data.tokenize.text_tokenizer import TextTokenizer
from internlm.initialize.images import image_processor
from internlm.model.llava.model import Llava
from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath

logger = get_logger(__name__)


def read_prompt_images(
    paths: Sequence[Path], prompts: Sequence[str], model: nn.Module, config: Config, checkpoint: StoragePath
) -> list[Tensor | None]:
    """The pictures of each prompt, float32 `[N, 3, H, W]`, or None; each `<image>` takes the next file.

    Args:
        paths: image files, in the order of `<image>` in all prompts.
        prompts: all prompts.
        model: of the checkpoint.
        config: of the checkpoint; its processor prepares the pictures as in training.
        checkpoint: has the preprocessor_config.json of an imported model.

    Raises:
        ConfigError: the model reads no pictures, or there are more or fewer files than `<image>`.
        DataError: a file is no picture.
    """
    if not isinstance(model, Llava):
        if paths:
            raise ConfigError(f"--image: a model of type '{config.model_type}' reads no pictures")
        return [None] * len(prompts)
    counts = [prompt.count(IMAGE_MARKER) for prompt in prompts]
    if sum(counts) != len(paths):
        raise ConfigError(
            f"--image: {len(paths)} file(s), but the prompts have {sum(counts)} times {IMAGE_MARKER}, which is the "
            "place of a picture"
        )
    if not paths:
        return [None] * len(prompts)
    check_pillow()
    processor = _processor(model, config, checkpoint)
    pixels = [torch.from_numpy(_read(path, processor)) for path in paths]
    return [torch.stack(own) if own else None for own in _split(pixels, counts)]


def image_prompt(ids: list[int], images: Tensor | None, image_token_id: int | None, device: torch.device) -> Prompt:
    """A prompt whose placeholders stand for pictures.

    Args:
        ids: its tokens.
        images: its pictures, float32 `[N, 3, H, W]`; None: it has none.
        image_token_id: the placeholder.
        device: of the model.
    """
    if images is None or image_token_id is None:
        return Prompt(ids)
    tokens_per_image = ids.count(image_token_id) // len(images)
    indices = image_feature_indices(torch.tensor([ids]), image_token_id, tokens_per_image, len(images)).to(device)
    inputs = {"images": images.to(device), "extra": {IMAGE_FEATURES: indices}}
    return Prompt([0 if id == image_token_id else id for id in ids], inputs)


def with_placeholders(tokenizer: TextTokenizer, model: nn.Module, config: Config) -> TextTokenizer:
    """The tokenizer of a model that reads pictures: `<image>` is as many placeholders as a picture has features."""
    if not isinstance(model, Llava):
        return tokenizer
    assert config.model.image_token_id is not None
    settings = ImageSettings(config.model.image_token_id, model.vision.tokens_per_image, config.data.seq_len)
    return PlaceholderTokenizer(tokenizer, settings)


def _split(pixels: list[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    remaining = iter(pixels)
    return [[next(remaining) for _ in range(count)] for count in counts]


def _read(path: Path, processor: ImageProcessor) -> object:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--image {path}: {error.strerror}") from None
    return processor.process(decode_image(data, str(path), "--image"), str(path), "--image")


def _processor(model: Llava, config: Config, checkpoint: StoragePath) -> ImageProcessor:
    if config.data.image_size is not None:
        return image_processor(config)
    size = model.vision.config.image_size
    imported = checkpoint / HF_FILES / PREPROCESSOR_CONFIG
    if imported.is_local and imported.is_file():
        logger.info("pictures are prepared as %s says", imported)
        return read_processor(imported.local, size)
    logger.info("pictures are prepared as CLIP does: the checkpoint has no %s", PREPROCESSOR_CONFIG)
    return ImageProcessor(size)
