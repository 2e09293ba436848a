"""Finds the classes that `model.hf_class` names: in transformers, in a module of the user, or in code of a folder."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from internlm.utils.errors import ConfigError


def config_object(hf_class: Mapping[str, Any]) -> Any:
    """A new config object of transformers with the values that the run was started with."""
    kind = _find(hf_class, "config_class")
    return kind.from_dict(dict(hf_class["config"]))


def model_class(hf_class: Mapping[str, Any]) -> Any:
    """The class of the model.

    Raises:
        ConfigError: it cannot be imported.
    """
    return _find(hf_class, "model_class")


def _find(hf_class: Mapping[str, Any], which: str) -> Any:
    reference = hf_class[which]
    folder = hf_class.get("code_folder")
    if folder is not None:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        try:
            return get_class_from_dynamic_module(reference, folder)
        except Exception as error:  # The code of the folder runs here.
            raise ConfigError(
                f"hf.folder = '{folder}': its code gives no {reference}: {type(error).__name__}: {error}"
            ) from error
    module, _, name = reference.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the Hugging Face class {reference} cannot be imported: {error}") from error
