"""Configs of runs with a tiny class of transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers.hf_classes import tiny_config
from internlm.config.hf_class import filled_model_section
from internlm.config.schema import Config, ModelConfig
from internlm.verify.case import Case, Combination


def class_folder(family: str, folder: Path, **changes: Any) -> Path:
    """A folder with the config.json of a tiny class."""
    config = tiny_config(family, **changes)
    config.architectures = None
    config.save_pretrained(folder)
    return folder


def hf_model_config(family: str, folder: Path, **changes: Any) -> ModelConfig:
    """The `model` section of a run in fp32 with a tiny class, whose config has these changes."""
    hf = {"folder": str(class_folder(family, folder, **changes))}
    return ModelConfig.model_validate(filled_model_section(hf, {"dtype": "torch.float32"}))


def hf_case(line: str, family: str, folder: Path) -> Case:
    """The combination that a text names, with a tiny class of transformers as its model."""
    case = Combination.parse(line).case()
    values = case.config.model_dump(mode="json")
    kept = ("dtype", "checkpoint", "checkpoint_save_policy", "num_chunks", "embed_split_hidden", "compile")
    model = {name: values["model"][name] for name in kept}
    hf = {"folder": str(class_folder(family, folder))}
    config = Config.model_validate({**values, "model_type": "hf", "hf": hf, "model": filled_model_section(hf, model)})
    return replace(case, config=config)
