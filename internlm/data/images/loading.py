"""Completes samples with the pixels of their pictures, in the process that reads the sample.

Packing and skipping see where pictures are and never read them, so a resumed run reads no picture twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from internlm.data.batch import IGNORE_INDEX
from internlm.data.images.decoding import decode_image
from internlm.data.images.image_source import ImageSource, RandomImage
from internlm.data.images.processor import ImageProcessor
from internlm.data.images.settings import ImageSettings
from internlm.data.packing.image_placeholders import image_feature_indices
from internlm.data.packing.sample import PlacedImages, Sample
from internlm.utils.errors import DataError, RemoteDataError


class ImageLoader:
    """Reads, decodes and processes the pictures of samples. Sent to worker processes.

    Args:
        settings: of the placeholders.
        processor: of the pixels.
        skip_bad_documents: replace a document with a picture that cannot be read by padding of the same length, and
            report it in `Sample.unreadable`.
    """

    def __init__(self, settings: ImageSettings, processor: ImageProcessor, skip_bad_documents: bool = False) -> None:
        self._settings, self._processor, self._skip_bad_documents = settings, processor, skip_bad_documents

    @property
    def facts(self) -> dict[str, Any]:
        """What samples depend on, as JSON values."""
        return {**self._settings.facts, "image_processor": self._processor.facts}

    def complete(self, sample: Sample) -> Sample:
        """The sample with its pixels and the indices of its image features, and 0 in place of placeholders.

        Raises:
            DataError: a picture cannot be read, or placeholders and pictures differ in number.
        """
        sample = replace(sample, input_ids=sample.input_ids.copy())
        images: list[NDArray[np.float32]] = []
        for placed in sample.images_at:
            try:
                images += [self.pixels(source) for source in placed.sources]
            except RemoteDataError:
                raise
            except DataError as error:
                if not self._skip_bad_documents:
                    raise
                sample = _without(sample, placed, str(error))
        ids = torch.from_numpy(np.atleast_2d(sample.input_ids))
        features = image_feature_indices(ids, self._settings.token_id, self._settings.tokens_per_image, len(images))
        sample.input_ids[sample.input_ids == self._settings.token_id] = 0
        pixels = np.stack(images) if images else None
        # Sources have served their purpose; their bytes need not travel from a worker.
        return replace(sample, image_features=features.numpy(), images=pixels, images_at=())

    def pixels(self, source: ImageSource) -> NDArray[np.float32]:
        """The pixels of one picture: float32 `[3, size, size]`.

        Raises:
            DataError: it cannot be read.
        """
        if isinstance(source, RandomImage):
            shape = (3, self._processor.size, self._processor.size)
            return np.random.default_rng(source.key).standard_normal(shape, dtype=np.float32)
        image = decode_image(source.read(), source.name, source.document)
        return self._processor.process(image, source.name, source.document)


def _without(sample: Sample, placed: PlacedImages, reason: str) -> Sample:
    """The sample with padding in place of a document."""
    is_padding = np.zeros(sample.input_ids.shape, dtype=np.bool_) if sample.is_padding is None else sample.is_padding
    input_ids, labels, is_padding = sample.input_ids.copy(), sample.labels.copy(), is_padding.copy()
    tokens = slice(placed.start, placed.stop)
    input_ids.reshape(-1)[tokens] = 0
    labels.reshape(-1)[tokens] = IGNORE_INDEX
    is_padding.reshape(-1)[tokens] = True
    return replace(
        sample,
        input_ids=input_ids,
        labels=labels,
        is_padding=is_padding,
        num_documents=sample.num_documents - 1,
        unreadable=(*sample.unreadable, reason),
    )
