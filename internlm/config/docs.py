"""Writes the reference of all keys from the schema: `python -m internlm.config.docs > doc/config.md`."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from internlm.config.legacy import LEGACY
from internlm.config.schema import Config
from internlm.config.schema.base import KeyInfo, Section, Status, default_of, is_required, key_info, section_class

_HEAD = """\
# Configuration reference

Written by `python -m internlm.config.docs > doc/config.md` from the schema (`internlm/config/schema`); a test compares.

A configuration is a Python file. Each of its globals is a key; dicts are sections. Modules, functions and classes are
no keys, nor are names in capitals that are not listed here, nor names with a leading underscore: these are the file's
own helpers. Any other unknown key is an error.

- **Inheritance**: `from internlm.config import read_base`, then `with read_base():` around `from ... import *` lines.
  A base file is looked for beside the config file, in the folders above it, and in the current folder. What follows in
  the file replaces what was inherited; `model["dtype"] = ...` and `model.update(...)` change single keys. InternEvo's
  own import of `read_base` works too.
- **Command line**: `--set key.path=value`, repeatable, wins over the file. The value is a Python literal, or text.
- **Python**: `Config(model=ModelConfig(...), data=DataConfig(...))` from `internlm.config.schema`; then `check_config`
  from `internlm.config.loader`.
- **Environment**: `tensorboard_folder` and `resume_tb_folder` fill the keys of these names when the file does not.
- All mistakes are reported together, each with its key, its value and the line that set it, before anything starts.
  `--print-config` prints every key with its value and where that comes from.

What this version does with a key:

| status | meaning |
|---|---|
| works | does what is said |
| refused | any value but the default (or those listed) is an error: the feature is not there yet |
| no effect | accepted so that existing configs load; setting it prints a notice with the reason |
| refused in training | works for users of the library; training is an error, for the reason given |
| with `key` | refines another key, and means nothing while that one has its default |
"""

_LEGACY_HEAD = """\
## Older spellings

Accepted, with one line of notice.

| in the file | read as |
|---|---|
"""


def render() -> str:
    """The whole reference, as Markdown."""
    parts = [_HEAD, *_sections("", Config), _LEGACY_HEAD + "\n".join(f"| {s.path} | {s.meaning} |" for s in LEGACY)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _sections(path: str, cls: type[Section]) -> Iterator[str]:
    """The table of one section, then those of its sections."""
    rows, nested = [], []
    for name, field in cls.model_fields.items():
        inner = section_class(field)
        if inner is not None:
            nested.append((f"{path}.{name}" if path else name, inner))
        info = key_info(field)
        if info is not None:
            meaning = (field.description or "").replace("<", "&lt;")
            rows.append(f"| {name} | {_type(field)} | {_default(field, info)} | {_status(info)} | {meaning} |")
    title = f"## {path}" if path else "## Top level"
    doc = (cls.__doc__ or "").strip()
    if rows:
        head = "| key | type | default | status | meaning |\n|---|---|---|---|---|\n"
        yield f"{title}\n\n{doc}\n\n{head}" + "\n".join(rows)
    for inner_path, inner in nested:
        yield from _sections(inner_path, inner)


def _type(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if getattr(limit, name, None) is not None
    ]
    return " ".join([_annotation(field.annotation), ", ".join(limits)]).strip()


def _annotation(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is None or kind is type(None):
        return "None"
    if kind is Any:
        return "any"
    if origin is Literal:
        return " or ".join(f"`{value!r}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_annotation(argument) for argument in arguments)
    if origin is not None:
        return f"{origin.__name__} of {', '.join(_annotation(a) for a in arguments if a is not ...)}"
    return "dict" if isinstance(kind, type) and issubclass(kind, Section) else kind.__name__


def _default(field: FieldInfo, info: KeyInfo) -> str:
    if info.derived:
        return f"{'always ' if info.forced else ''}{info.derived}"
    return "**required**" if is_required(field) else f"`{default_of(field)!r}`"


def _status(info: KeyInfo) -> str:
    if info.status is Status.LATER:
        also = "".join(f", `{value!r}` accepted" for value in info.accepts)
        return f"refused: {info.detail}{also}"
    if info.status is Status.NO_EFFECT:
        return f"no effect: {info.detail}"
    if info.status is Status.LIBRARY_ONLY:
        return f"refused in training: {info.detail}"
    return f"with `{info.detail}`" if info.status is Status.DEPENDENT else "works"


if __name__ == "__main__":
    print(render(), end="")
