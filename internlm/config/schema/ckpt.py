"""The `ckpt` section: saving, resuming and loading of weights."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from internlm.config.schema.base import Section, key, later, no_effect, section, used_with


def _never(value: Any) -> Any:
    """InternEvo writes "never" as an infinite interval."""
    return None if value == math.inf or value == "inf" else value


Interval = Annotated[int | None, BeforeValidator(_never)]
"""Steps between two events; None (or inf) is never."""

Content = Literal["model", "sampler", "optimizer", "scheduler", "all"]


class LoadCkptInfo(Section):
    """What to load when there is nothing to resume."""

    path: str | None = key(None, "Checkpoint folder; None loads nothing.")
    content: Annotated[tuple[Content, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)] = key(
        ("model",), "Parts to load: model, sampler, optimizer, scheduler, or all."
    )
    ckpt_type: str = later("internevo", "Format of the folder.", "loading this format")


class UniversalCkptConfig(Section):
    """InternEvo's layout-free checkpoints."""

    enable: bool = no_effect(False, "Write layout-free checkpoints.", "every checkpoint here is layout-free")
    async_save: bool = later(False, "Write in the background.", "saving in the background")
    broadcast_load: bool = later(False, "Read once and broadcast to the data ranks.", "broadcast loading")


class CkptConfig(Section):
    """Where and when to save, and what to start from."""

    enable_save_ckpt: bool = key(True, "Save checkpoints.")
    save_ckpt_folder: str | None = key(
        None, "Folder of the checkpoints, one subfolder a step; `local:` before the path is optional."
    )
    checkpoint_every: Interval = key(None, "Steps between two checkpoints; needed when saving is on.")
    oss_snapshot_freq: Interval = later(
        None, "Steps between two rotating snapshots; refused only while saving is on.", "rotating snapshots"
    )
    snapshot_ckpt_folder: str | None = used_with(
        None, "Folder of the rotating snapshots; None: <save_ckpt_folder>/snapshot.", "ckpt.oss_snapshot_freq"
    )
    async_upload: bool = no_effect(
        False, "Upload in the background to an object store.", "local folders are written directly"
    )
    async_upload_tmp_folder: str | None = used_with(None, "Local folder that uploads start from.", "ckpt.async_upload")
    load_ckpt_info: LoadCkptInfo | None = key(
        None, "dict(path, content, ckpt_type): what to load when there is nothing to resume."
    )
    auto_resume: bool = key(
        True,
        "Resume if a complete checkpoint is in save_ckpt_folder, else load load_ckpt_info, else start from scratch. "
        "False: never resume.",
    )
    stop_file_path: str | None = later(None, "File with the step at which to save and stop.", "the stop file")
    enable_internevo2hf_ckpt: bool = later(False, "Also write <step>_hf/.", "export while training")
    universal_ckpt: UniversalCkptConfig = section(UniversalCkptConfig, "InternEvo's layout-free checkpoints.")
    generate_meta_data: bool | dict[str, Any] = no_effect(
        False, "Write metadata for offline resharding.", "checkpoints reshard without it"
    )

    @model_validator(mode="after")
    def _fill(self) -> CkptConfig:
        if self.load_ckpt_info is not None and self.load_ckpt_info.path is None:
            self._derive(load_ckpt_info=None)
        return self
