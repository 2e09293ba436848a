"""Translates older spellings of keys and values, InternEvo's and this project's, before the schema sees them.

Each translation yields one notice. Works on the plain dict of a config file; knows nothing of defaults or rules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from internlm.config.origins import Origin, forget, move

Tree = dict[str, Any]

_ABSENT = object()


@dataclass(frozen=True)
class Legacy:
    """One older spelling: its path, its current meaning, and the function that translates it."""

    path: str
    meaning: str
    apply: Callable[[Edit], str | None]
    """Returns a notice, or None if the spelling does not occur."""


class Edit:
    """Reads and moves values in a tree of dicts, with their origins."""

    def __init__(self, tree: Tree, origins: dict[str, Origin]) -> None:
        self.tree = tree
        self.origins = origins

    def get(self, path: str) -> Any:
        """The value at a dotted path, or `_ABSENT`."""
        value: Any = self.tree
        for name in path.split("."):
            if not isinstance(value, dict) or name not in value:
                return _ABSENT
            value = value[name]
        return value

    def has(self, path: str) -> bool:
        return self.get(path) is not _ABSENT

    def put(self, path: str, value: Any) -> bool:
        """Set a value and create missing sections; False if a parent is not a section."""
        *outer, name = path.split(".")
        place = self.tree
        for part in outer:
            inner = place.setdefault(part, {})
            if not isinstance(inner, dict):
                return False
            place = inner
        place[name] = value
        return True

    def drop(self, path: str) -> Any:
        """Remove a value and return it."""
        outer, _, name = path.rpartition(".")
        place = self.get(outer) if outer else self.tree
        forget(path, self.origins)
        return place.pop(name)

    def rename(self, old: str, new: str) -> str | None:
        """Move a value to a new path, unless that one is set."""
        if not self.has(old):
            return None
        if self.has(new):
            self.drop(old)
            return f"{old} is ignored, because {new} is given"
        move(old, new, self.origins)
        self.put(new, self.drop(old))
        return f"{old} is read as {new}"


def translate_legacy(tree: Tree, origins: dict[str, Origin]) -> list[str]:
    """Translate all older spellings in place. Returns one notice for each one found."""
    edit = Edit(tree, origins)
    return [notice for spelling in LEGACY if (notice := spelling.apply(edit)) is not None]


def _renamed(old: str, new: str) -> Legacy:
    return Legacy(old, f"`{new}`", lambda edit: edit.rename(old, new))


def _number_for_section(path: str) -> Legacy:
    def apply(edit: Edit) -> str | None:
        value = edit.get(path)
        if isinstance(value, bool) or not isinstance(value, int):
            return None
        edit.put(path, {"size": value})
        move(path, f"{path}.size", edit.origins)
        return f"{path} = {value} is read as {path} = dict(size={value})"

    return Legacy(f"{path} (a number)", f"`{path}.size`", apply)


def _value(path: str, old: str, new: str) -> Legacy:
    def apply(edit: Edit) -> str | None:
        if edit.get(path) != old:
            return None
        edit.put(path, new)
        return f"{path} = '{old}' is read as '{new}'"

    return Legacy(f"{path} = '{old}'", f"`{path} = '{new}'`", apply)


def _shared_experts(edit: Edit) -> str | None:
    old, new = "model.moe_use_residual", "model.num_shared_experts"
    value = edit.get(old)
    notice = edit.rename(old, new)
    if notice is not None and edit.get(new) is value:
        edit.put(new, int(bool(value)))
    return notice


def _load_weights_only(edit: Edit) -> str | None:
    old, new = "ckpt.load_model_only_folder", "ckpt.load_ckpt_info"
    if not edit.has(old):
        return None
    path = edit.drop(old)
    if path is None:
        return None
    if edit.get(new) not in (_ABSENT, None):
        return f"{old} is ignored, because {new} is given"
    edit.put(new, {"path": path, "content": ("model",), "ckpt_type": "internevo"})
    return f"{old} is read as {new} with content=('model',)"


def _load_folder(edit: Edit) -> str | None:
    old, new = "ckpt.load_ckpt_folder", "ckpt.load_ckpt_info"
    load_optimizer = edit.drop("ckpt.load_optimizer") if edit.has("ckpt.load_optimizer") else True
    if not edit.has(old):
        return None if load_optimizer is True else "ckpt.load_optimizer is ignored: load_ckpt_info.content decides"
    value = edit.drop(old)
    if value is None:
        return None
    if edit.get(new) not in (_ABSENT, None):
        return f"{old} is ignored, because {new} is given"
    if not isinstance(value, dict):
        content = ("all",) if load_optimizer else ("model", "sampler", "scheduler")
        value = {"path": value, "content": content, "ckpt_type": "internevo"}
    edit.put(new, value)
    return f"{old} is read as {new} with content={tuple(value.get('content', ()))}"


def _load_given(edit: Edit) -> str | None:
    old, new = "ckpt.load_given_ckpt", "ckpt.auto_resume"
    value = edit.get(old)
    notice = edit.rename(old, new)
    if notice is not None and notice.endswith("is given"):
        return notice
    if notice is not None:
        edit.put(new, not value)
        return f"{old} = {value} is read as {new} = {not value}"
    return None


_CHECKPOINT_TYPES = {"normal": "internevo", "internlm": "internevo", "hf_llama": "hf"}
"""InternEvo's current and former names of checkpoint types, in lower case -> names here."""


def _checkpoint_type(edit: Edit) -> str | None:
    path = "ckpt.load_ckpt_info.ckpt_type"
    old = edit.get(path)
    if not isinstance(old, str):
        return None
    new = _CHECKPOINT_TYPES.get(old.lower(), old.lower())
    # Only known names are lowered: others may be types that a user has registered.
    if new == old or new not in ("internevo", "hf", "llama"):
        return None
    edit.put(path, new)
    return f"{path} = '{old}' is read as '{new}'"


def _read_as(path: str, old: str, new: object, is_old: Callable[[Any], bool]) -> Legacy:
    """A value that InternEvo treats as another one; `old` describes it, as written in a config."""

    def apply(edit: Edit) -> str | None:
        value = edit.get(path)
        if value is _ABSENT or not is_old(value):
            return None
        edit.put(path, new)
        return f"{path} = {value!r} is read as {new!r}"

    return Legacy(f"{path} {old}", f"{new!r}", apply)


def _empty(path: str) -> Legacy:
    return _read_as(path, "= ''", None, lambda value: isinstance(value, str) and value == "")


def _unset(path: str) -> Legacy:
    """None given for a key that has a default."""

    def apply(edit: Edit) -> str | None:
        if edit.get(path) is not None:
            return None
        edit.drop(path)
        return f"{path} = None is read as its default"

    return Legacy(f"{path} = None", "its default", apply)


def _not_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value <= 0


def _universal(old: str) -> Legacy:
    """InternEvo's option to write universal checkpoints in the background, if it writes them."""
    section, new = "ckpt.universal_ckpt", "ckpt.async_save"

    def apply(edit: Edit) -> str | None:
        if edit.has(f"{section}.{old}") and edit.get(f"{section}.enable") is False:
            edit.drop(f"{section}.{old}")
            return f"{section}.{old} is ignored, because {section}.enable = False"
        return edit.rename(f"{section}.{old}", new)

    return Legacy(f"{section}.{old}", f"`{new}`, unless `{section}.enable` is False", apply)


def _zero_bubble(edit: Edit) -> str | None:
    old, new = "parallel.pipeline.zero_bubble", "parallel.pipeline.mode"
    if not edit.has(old):
        return None
    value = edit.drop(old)
    if not value:
        return f"{old} = {value} is ignored: {new} names the schedule"
    if edit.has(new):
        return f"{old} = {value} is ignored, because {new} is given"
    edit.put(new, "ZBH1")
    return f"{old} = {value} is read as {new} = 'ZBH1'"


_OPTIONAL_PATHS = (
    "data.valid_folder",
    "data.tokenizer_path",
    "ckpt.load_ckpt_info.path",
    "ckpt.save_ckpt_folder",
    "ckpt.snapshot_ckpt_folder",
    "ckpt.stop_file_path",
    "tensorboard_folder",
    "resume_tb_folder",
)

_WITH_DEFAULTS = (
    "loss.op_type",
    "parallel.tensor.mode",
    "parallel.weight.overlap",
    "parallel.expert_weight.overlap",
    "parallel.expert.no_tp",
    "ckpt.auto_resume",
)

_OLD_EXPERT_KEYS = (
    "capacity_factor",
    "eval_capacity_factor",
    "min_capacity",
    "noisy_gate_policy",
    "drop_tokens",
    "use_rts",
    "use_fused_gating",
)

LEGACY: tuple[Legacy, ...] = (
    *(
        _number_for_section(f"parallel.{name}")
        for name in ("zero1", "tensor", "pipeline", "weight", "expert", "expert_weight", "expert_zero1")
    ),
    _renamed("hybrid_zero_optimizer.zero_overlap_communication", "hybrid_zero_optimizer.overlap_sync_grad"),
    _renamed("monitor.tensorboard", "tensorboard"),
    _renamed("alert_address", "monitor.alert.feishu_alert_address"),
    _universal("aysnc_save"),
    _universal("async_save"),
    Legacy("ckpt.load_model_only_folder", "`ckpt.load_ckpt_info` with content ('model',)", _load_weights_only),
    Legacy("ckpt.load_ckpt_folder, ckpt.load_optimizer", "`ckpt.load_ckpt_info`", _load_folder),
    Legacy("ckpt.load_given_ckpt", "the opposite of `ckpt.auto_resume`", _load_given),
    Legacy(
        "ckpt.load_ckpt_info.ckpt_type = 'normal', 'internlm', 'hf_llama', or a type in capitals",
        "`'internevo'`, `'internevo'`, `'hf'`, the type in lower case",
        _checkpoint_type,
    ),
    _value("model_type", "LLAMA", "LLAMA2"),
    _value("model_type", "INTERNLM2_PUBLIC", "INTERNLM2"),
    Legacy("model.moe_use_residual", "`model.num_shared_experts` 1 or 0", _shared_experts),
    _renamed("model.moe_gate_k", "model.top_k"),
    *(_renamed(f"model.moe_{name}", f"model.moe_layer_kwargs.{name}") for name in _OLD_EXPERT_KEYS),
    _renamed("model.rope_scaling.rope_type", "model.rope_scaling.type"),
    _renamed("model.checkpoint_keep", "model.checkpoint_save_policy"),
    _renamed("model.cpu_products", "model.cpu_gemm"),
    Legacy("parallel.pipeline.zero_bubble", "`parallel.pipeline.mode = 'ZBH1'`", _zero_bubble),
    _read_as("data.empty_cache_and_diag_interval", "<= 0", 50, _not_positive),
    _read_as("model.sliding_window", "= 0", None, lambda value: value == 0),
    _read_as("model.head_dim", "= 0", None, lambda value: value == 0),
    *(_read_as(f"parallel.{name}.size", "<= 0", 1, _not_positive) for name in ("pipeline", "expert_weight")),
    _read_as("ckpt.load_ckpt_info", "= False or ''", None, lambda value: value is False or value == ""),
    *(_empty(path) for path in _OPTIONAL_PATHS),
    *(_unset(path) for path in _WITH_DEFAULTS),
)
