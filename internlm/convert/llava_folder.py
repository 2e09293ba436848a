"""A Hugging Face folder of a LLaVA model: a language model, a vision tower and a projector in one.

Files written by transformers have the names `language_model.*`, `vision_tower.*` and `multi_modal_projector.*`; in
memory, its classes put `model.` in front. Older files have `vision_tower.vision_model.*`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from internlm.convert.hf_folder import CONFIG, HfEntry, HfFolder, HfWeights
from internlm.model.decoder import Decoder
from internlm.model.huggingface.from_config import HfModel, from_hf_config
from internlm.model.huggingface.llava_config import MODEL_TYPE, from_llava_config, text_values
from internlm.model.llava.model import Llava
from internlm.utils.errors import CheckpointError
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath

logger = get_logger(__name__)

_TOWER, _PROJECTOR = "vision_tower.", "multi_modal_projector."
_OUR_PROJECTOR = "vision_proj."
_POSITIONS = "embeddings.position_ids"
"""End of the name of a buffer that old library versions saved."""


class LlavaFolder(HfFolder):
    """A folder of a LLaVA model. `entries` have the names of the folder."""

    @cached_property
    def model(self) -> HfModel:
        return from_llava_config(self.config, str(self.path / CONFIG))

    @cached_property
    def vision_names(self) -> dict[str, str]:
        """Our name of a tensor of tower or projector -> name in the folder, without buffers."""
        return {ours: name for name in self.entries if (ours := vision_name(name)) is not None}

    @cached_property
    def text(self) -> HfFolder:
        """The language model alone, with the names of its own class."""
        return _TextPart(self)


class _TextPart(HfFolder):
    def __init__(self, folder: LlavaFolder) -> None:
        self.path = folder.path
        self._whole = folder
        names = {_text_name(name): name for name in folder.entries if _is_text(name)}
        self._names: dict[str, str] = names
        self.entries: dict[str, HfEntry] = {ours: folder.entries[name] for ours, name in names.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        return text_values(self._whole.config)

    @cached_property
    def model(self) -> HfModel:
        return from_hf_config(self.config, f"{self.path / CONFIG}, text_config")

    def read(self, name: str) -> Tensor:
        return self._whole.read(self._names[name])


class LlavaWeights:
    """The weights of a folder with the names and in the form of a model: a `WeightSource`. See `HfWeights`.

    Args:
        folder: source of the weights.
        model: to load, or a part of it.

    Raises:
        CheckpointError: the shape of a tensor does not fit the model.
    """

    def __init__(self, folder: LlavaFolder, model: Llava) -> None:
        self.folder = folder
        self._text = HfWeights(folder.text, model.architecture)
        self._check_positions()
        needed, names = model.vision_weights(), folder.vision_names
        wrong = [
            f"'{names[name]}' has shape {list(folder.entries[names[name]].shape)}, the model needs {list(tensor.shape)}"
            for name, tensor in needed.items()
            if name in names and folder.entries[names[name]].shape != tuple(tensor.shape)
        ]
        if wrong:
            shown = "\n  ".join(wrong[:20])
            raise CheckpointError(f"the weights in '{folder.path}' do not fit this model:\n  {shown}")
        self._names = {name: names[name] for name in needed if name in names}
        self.lacking = {**self._text.lacking, **{name: [file_name(name)] for name in needed if name not in names}}
        self.missing = [*self._text.missing, *(file_name(name) for name in needed if name not in names)]
        self.unexpected = [*self._text.unexpected, *(theirs for ours, theirs in names.items() if ours not in needed)]
        self.tensors: dict[str, Tensor] = {
            **self._text.tensors,
            **{name: _meta(folder.entries[theirs]) for name, theirs in self._names.items()},
        }

    def names(self) -> Collection[str]:
        """The model's names of all weights in the folder, and the folder's names of unexpected tensors."""
        return [*self.tensors, *self.unexpected]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return tuple(self.tensors[name].shape) if name in self.tensors else self.folder.entries[name].shape

    def read(self, name: str) -> Tensor:
        """Read a full weight."""
        return self.folder.read(self._names[name]) if name in self._names else self._text.read(name)

    def _check_positions(self) -> None:
        for name in self.folder.entries:
            if name.endswith(_POSITIONS):
                positions = self.folder.read(name).flatten()
                if not torch.equal(positions, torch.arange(len(positions))):
                    raise CheckpointError(
                        f"'{self.folder.path}': '{name}' is not 0, 1, 2 ..., as in transformers' class"
                    )
                logger.info("%s: dropped the buffer '%s', which the class has", self.folder.path, name)


class TowerWeights:
    """The weights of a vision tower, from the folder of a CLIP or SigLIP model: a `WeightSource`.

    Args:
        folder: has the tower alone, or with its text model, which is left out.
        model: with the tower, or a part of it.

    Raises:
        CheckpointError: a weight of the tower is missing.
    """

    def __init__(self, folder: HfFolder, model: Llava) -> None:
        self.folder = folder
        found = {f"{_TOWER}{name.removeprefix('vision_model.')}": name for name in folder.entries}
        needed = [name for name in model.vision_weights() if name.startswith(_TOWER)]
        missing = [name.removeprefix(_TOWER) for name in needed if name not in found]
        if missing:
            raise CheckpointError(
                f"the vision tower in '{folder.path}' lacks {len(missing)} weights, such as '{missing[0]}'"
            )
        self._names = {name: found[name] for name in needed}

    def names(self) -> Collection[str]:
        """Names of all weights of the tower."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return self.folder.entries[self._names[name]].shape

    def read(self, name: str) -> Tensor:
        """Read a full weight."""
        return self.folder.read(self._names[name])


def open_hf_folder(path: StoragePath) -> HfFolder:
    """A Hugging Face folder of any supported model.

    Raises:
        CheckpointError: see `HfFolder`.
    """
    folder = HfFolder(path)
    return LlavaFolder(path) if folder.config.get("model_type") == MODEL_TYPE else folder


def open_folder_weights(folder: HfFolder, model: Decoder) -> HfWeights | LlavaWeights:
    """The weights of a folder from `open_hf_folder`, in the form of a model or of a part of it.

    The weights of a language model alone are a part of those of a LLaVA.

    Raises:
        CheckpointError: the weights do not fit the model.
    """
    if not isinstance(folder, LlavaFolder):
        return HfWeights(folder, model.architecture)
    if not isinstance(model, Llava):
        raise CheckpointError(f"'{folder.path}' is a LLaVA, which needs model_type = 'LLAVA'")
    return LlavaWeights(folder, model)


def vision_name(name: str) -> str | None:
    """Our name of a tensor of tower or projector; None for other tensors, and for buffers."""
    name = re.sub(r"^model\.(vision_tower|multi_modal_projector)\.", r"\1.", name)
    if name.startswith(_TOWER) and not name.endswith(_POSITIONS):
        return _TOWER + name.removeprefix(_TOWER).removeprefix("vision_model.")
    return _OUR_PROJECTOR + name.removeprefix(_PROJECTOR) if name.startswith(_PROJECTOR) else None


def file_name(name: str) -> str:
    """The name in files of a tensor: ours for tower and projector, that of its class for the language model."""
    if name.startswith(_OUR_PROJECTOR):
        return _PROJECTOR + name.removeprefix(_OUR_PROJECTOR)
    return name if name.startswith(_TOWER) else f"language_model.{name}"


def with_file_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Give tensors the names that transformers writes; see `file_name`."""
    return {file_name(name): tensor for name, tensor in tensors.items()}


def _is_text(name: str) -> bool:
    return vision_name(name) is None and not name.endswith(_POSITIONS)


def _text_name(name: str) -> str:
    if name.startswith("model.language_model."):
        return f"model.{name.removeprefix('model.language_model.')}"
    return name.removeprefix("language_model.")


def _meta(entry: HfEntry) -> Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")
