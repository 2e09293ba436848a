"""The `ckpt` section: saving, resuming and loading of weights."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from internlm.config.schema.base import PathText, Section, key, no_effect, section, used_with
from internlm.utils.storage import storage_path


def _never(value: Any) -> Any:
    """Convert InternEvo's infinite interval to None."""
    return None if value == math.inf or value == "inf" else value


Interval = Annotated[int | None, BeforeValidator(_never)]
"""Steps between two events; None (or inf) is never."""

SnapshotInterval = Annotated[int | None, BeforeValidator(lambda value: None if value == 0 else _never(value))]
"""An `Interval` for which 0 is never, too, as InternEvo's configs compute it as half of checkpoint_every."""

Content = Literal["model", "sampler", "optimizer", "scheduler", "all"]


class LoadCkptInfo(Section):
    """What to load when there is nothing to resume."""

    path: PathText = key(None, "Checkpoint folder; None loads nothing.")
    content: Annotated[tuple[Content, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)] = key(
        ("model",), "Parts to load: model, sampler, optimizer, scheduler, or all."
    )
    ckpt_type: str = key(
        "internevo",
        "Format of the folder: internevo (written by this project), hf (Hugging Face), llama (Meta), or a type that "
        "you registered. All but the first contain only weights.",
    )
    strict: bool = key(True, "Refuse missing or unknown weights; False loads what fits and logs the names of the rest.")

    @property
    def is_placeholder(self) -> bool:
        """Whether the path is a placeholder of an example, such as `local:llm_ckpts/xxxx`."""
        return self.path is not None and any(re.fullmatch("[xX]{3,}", part) for part in re.split("[/:]", self.path))


class UniversalCkptConfig(Section):
    """InternEvo's layout-free checkpoints."""

    enable: bool = no_effect(False, "Write layout-free checkpoints.", "every checkpoint here is layout-free")
    broadcast_load: bool = no_effect(
        False, "Read once and broadcast to the data ranks.", "each rank reads only its boxes of the tensors"
    )


class CkptConfig(Section):
    """Where and when to save, and what to start from."""

    enable_save_ckpt: bool = key(True, "Save checkpoints.")
    save_ckpt_folder: PathText = key(
        None,
        "Folder of the checkpoints, one subfolder per step: a path, with or without `local:`, or the URL of an object "
        "store (doc/checkpoints.md).",
    )
    checkpoint_every: Interval = key(None, "Steps between two checkpoints; required when saving is on.")
    keep_latest: int | None = key(
        None, "Checkpoints to keep; older ones are deleted after a save is complete. None: all.", ge=1
    )
    oss_snapshot_freq: SnapshotInterval = key(
        None,
        "Steps between two snapshots: complete checkpoints that alternate between two folders. 0 or None: no "
        "snapshots.",
    )
    snapshot_ckpt_folder: PathText = used_with(
        None, "Folder of the snapshots; None: <save_ckpt_folder>/snapshot.", "ckpt.oss_snapshot_freq"
    )
    async_save: bool = key(False, "Write checkpoints in the background; training waits only for a copy to host memory.")
    async_upload: bool = key(False, "Like async_save, but only if the folder is in an object store.")
    async_upload_tmp_folder: PathText = no_effect(
        None, "Local folder that uploads start from.", "uploads start from memory"
    )
    load_ckpt_info: LoadCkptInfo | None = key(
        None, "dict(path, content, ckpt_type, strict): what to load when there is nothing to resume."
    )
    auto_resume: bool = key(
        True,
        "Resume if a complete checkpoint is in save_ckpt_folder, else load load_ckpt_info, else start from scratch. "
        "False, and without enable_save_ckpt: never resume.",
    )
    allow_model_changes: bool | tuple[str, ...] = key(
        False,
        "Keys of the model, such as ('model.rope_base',), that may differ from the resumed or loaded checkpoint "
        "although this changes the outputs of the weights; True: any.",
    )
    stop_file_path: PathText = key(
        None,
        "Local file with a number: N saves and stops at step N, -N saves at step N. A run writes 0 when it starts.",
    )
    enable_internevo2hf_ckpt: bool = key(False, "Also write the weights in Hugging Face's format, to <step>_hf/.")
    universal_ckpt: UniversalCkptConfig = section(UniversalCkptConfig, "InternEvo's layout-free checkpoints.")
    generate_meta_data: bool | dict[str, Any] = no_effect(
        False, "Write metadata for offline resharding.", "checkpoints reshard without it"
    )

    @property
    def saves_in_background(self) -> bool:
        """Whether checkpoints are written in the background."""
        return self.async_save or (self.async_upload and not self.is_local)

    @property
    def is_local(self) -> bool:
        """Whether checkpoints are saved to a local disk, or nowhere."""
        return not self.save_ckpt_folder or storage_path(self.save_ckpt_folder).is_local

    @model_validator(mode="after")
    def _fill(self) -> CkptConfig:
        if self.load_ckpt_info is not None and self.load_ckpt_info.path is None:
            self._derive(load_ckpt_info=None)
        return self
