"""The building blocks of the schema: the `Section` class and the functions that declare a key.

Each key is declared with its default, one line of documentation and its `Status`. The documentation, the refusals of
`config/unsupported.py` and the notices are derived from these declarations. Knows nothing of individual keys, config
files or rules between keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Annotated, Any, cast, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from internlm.utils.errors import ConfigError
from internlm.utils.paths import expand_home


def _expand(value: Any) -> Any:
    try:
        return expand_home(value) if isinstance(value, str) else value
    except ConfigError as error:
        raise ValueError(f"a path that can be found: {error}") from error


EXPAND_HOME = BeforeValidator(_expand)
PathText = Annotated[str | None, EXPAND_HOME]
"""A path or URL; a leading `~` is the home folder."""


class Status(Enum):
    """What this version does with a key."""

    SUPPORTED = "supported"
    LATER = "refused unless default"
    NO_EFFECT = "no effect"
    DEPENDENT = "dependent"
    LIBRARY_ONLY = "library only"


@dataclass(frozen=True)
class KeyInfo:
    """The declaration of one key, as written beside its default."""

    status: Status
    detail: str = ""
    """LATER: the missing feature; NO_EFFECT: the reason; DEPENDENT: the key that this one refines; LIBRARY_ONLY: why
    training refuses it."""
    accepts: tuple[Any, ...] = ()
    """LATER: values besides the default that do not need the feature."""
    derived: str = ""
    """Description of the value when the key is absent; empty for a plain default."""
    forced: bool = False
    """The derived value overrides one that the user sets."""
    changes_outputs: bool | None = None
    """Keys of the model: whether another value changes the outputs of the same weights, apart from dtypes and kernels.
    A run may then not continue from a checkpoint with another value, unless `ckpt.allow_model_changes` permits it."""


_EXTRA = "internlm"


def _field(default: Any, doc: str, info: KeyInfo, constraints: dict[str, Any]) -> Any:
    extra: dict[str, Any] = {_EXTRA: {**asdict(info), "status": info.status.value}}
    return Field(default, description=doc, json_schema_extra=extra, **constraints)


def key(
    default: Any,
    doc: str,
    *,
    derived: str = "",
    forced: bool = False,
    changes_outputs: bool | None = None,
    **constraints: Any,
) -> Any:
    """A key that works; `...` as default makes it required."""
    info = KeyInfo(Status.SUPPORTED, derived=derived, forced=forced, changes_outputs=changes_outputs)
    return _field(default, doc, info, constraints)


def later(
    default: Any,
    doc: str,
    feature: str,
    *,
    accepts: tuple[Any, ...] = (),
    changes_outputs: bool | None = None,
    **constraints: Any,
) -> Any:
    """A key whose feature is missing: any value but the default (or `accepts`) is refused by name."""
    return _field(default, doc, KeyInfo(Status.LATER, feature, accepts, changes_outputs=changes_outputs), constraints)


def no_effect(
    default: Any, doc: str, reason: str, *, derived: str = "", forced: bool = False, **constraints: Any
) -> Any:
    """A key accepted for compatibility with existing configs, without effect for the given reason."""
    info = KeyInfo(Status.NO_EFFECT, reason, derived=derived, forced=forced, changes_outputs=False)
    return _field(default, doc, info, constraints)


def used_with(default: Any, doc: str, other: str, *, changes_outputs: bool | None = None, **constraints: Any) -> Any:
    """A key that refines key `other`; without effect while that one has its default."""
    return _field(default, doc, KeyInfo(Status.DEPENDENT, other, changes_outputs=changes_outputs), constraints)


def library_only(
    default: Any, doc: str, reason: str, *, changes_outputs: bool | None = None, **constraints: Any
) -> Any:
    """A key that works for users of the library; training refuses any value but the default, for `reason`."""
    return _field(default, doc, KeyInfo(Status.LIBRARY_ONLY, reason, changes_outputs=changes_outputs), constraints)


def section(cls: type[Section] | None, doc: str) -> Any:
    """A nested section, present with its defaults when the config does not mention it; None makes it required."""
    return Field(..., description=doc) if cls is None else Field(default_factory=cls, description=doc)


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and a built config is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _absent_when_none(cls, values: Any) -> Any:
        """Treat a derived key or a section that is None as absent."""
        if not isinstance(values, Mapping):
            return values
        return {
            name: value
            for name, value in values.items()
            if not (value is None and name in cls.model_fields and _has_default_for_none(cls.model_fields[name]))
        }

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse True and False for an integer, where pydantic would read 1 and 0."""
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        kinds = {annotation, *get_args(annotation)}
        if isinstance(value, bool) and int in kinds and not kinds & {bool, float}:
            raise ValueError("a valid integer")
        return value

    def _derive(self, **values: Any) -> None:
        """Fill derived keys from a validator. They do not count as set by the user (`model_fields_set`)."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def is_set(section: Section, path: str) -> bool:
    """Whether the user gave the key at a dotted path, instead of leaving it to its default."""
    *outer, name = path.split(".")
    for part in outer:
        if part not in section.model_fields_set:
            return False
        inner = getattr(section, part)
        if not isinstance(inner, Section):
            return False
        section = inner
    return name in section.model_fields_set


def key_info(field: FieldInfo) -> KeyInfo | None:
    """The declaration of a key; None for a section or a field without one."""
    extra = field.json_schema_extra
    written: Any = extra.get(_EXTRA) if isinstance(extra, dict) else None
    return None if written is None else KeyInfo(**{**written, "status": Status(written["status"])})


def is_path(field: FieldInfo) -> bool:
    """Whether a key is a path or URL."""
    return EXPAND_HOME in field.metadata


def is_derived(field: FieldInfo) -> bool:
    """Whether the default of a key depends on other keys."""
    info = key_info(field)
    return info is not None and bool(info.derived)


def _has_default_for_none(field: FieldInfo) -> bool:
    """Whether None is not a value of the field but a request for its default."""
    return is_derived(field) or (section_class(field) is not None and key_info(field) is None)


def section_class(field: FieldInfo) -> type[Section] | None:
    """The Section class of a field, also when it is optional; None for a plain key."""
    if get_origin(field.annotation) is list:
        return None
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def item_class(field: FieldInfo) -> type[Section] | None:
    """The Section class of the items of a list; None for any other key."""
    (item, *_) = get_args(field.annotation) or (None,)
    is_list = get_origin(field.annotation) is list and isinstance(item, type) and issubclass(item, Section)
    return item if is_list else None


def default_of(field: FieldInfo) -> Any:
    """The default of a key; PydanticUndefined when it is required."""
    if field.default_factory is not None:
        return cast(Callable[[], Any], field.default_factory)()
    return field.default


def is_required(field: FieldInfo) -> bool:
    """Whether a key has no default."""
    return field.is_required() or default_of(field) is PydanticUndefined


def walk_schema(cls: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf key below `cls` as (dotted path, field), in order of declaration."""
    for name, field in cls.model_fields.items():
        nested = section_class(field)
        if nested is None or key_info(field) is not None:
            yield prefix + name, field
        if nested is not None:
            yield from walk_schema(nested, f"{prefix}{name}.")


def walk_values(config: Section, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    """Every leaf key of a built config as (dotted path, field, value). An optional section that is None is one leaf."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Section):
            yield from walk_values(value, f"{prefix}{name}.")
        else:
            yield prefix + name, field, value
