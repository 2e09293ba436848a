"""Special tokens that a tokenizer's folder names: tokenizer_config.json, special_tokens_map.json, added_tokens.json.

Owns which file counts, by the rules of transformers. Knows no vocabulary: whether a token exists is for the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from internlm.utils.errors import DataError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

CONFIG, MAP, ADDED, GENERATION = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text as it is spelt, before anything is split or normalised.

    Attributes:
        content: its spelling.
        lstrip, rstrip: it takes the white space before / after it along.
        single_word: it is not found inside of a word.
        special: decoders may leave it out.
    """

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    special: bool = True


@dataclass(frozen=True)
class SpecialTokens:
    """What the files of a folder say.

    Attributes:
        named: of bos_token, eos_token, pad_token, unk_token: those that a file names, None where it says "none".
        added: id -> token of the vocabulary's additions and special tokens.
        others: further special tokens, named without an id.
    """

    def end_id(self, key: str, ids: Mapping[str, int], where: str) -> int | None:
        """The id of `bos_token` or `eos_token`, which a file names.

        Args:
            ids: spelling -> id of the whole vocabulary.
            where: the tokenizer, for messages.

        Raises:
            DataError: the vocabulary lacks the token.
        """
        content = self.named[key]
        if content is None:
            return None
        if content not in ids:
            raise DataError(
                f"{where}: {key} is '{content}', but the vocabulary has no such token; name one that it has in "
                f"{CONFIG} ({MAP} counts where that does not name any)"
            )
        return ids[content]

    named: Mapping[str, str | None] = field(default_factory=dict)
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    others: Sequence[AddedToken] = ()


def read_special_tokens(folder: Path) -> SpecialTokens:
    """The special tokens that the files in `folder` name; empty where there is no such file.

    special_tokens_map.json counts before tokenizer_config.json, unless the latter lists `added_tokens_decoder` (it is
    then the newer file); what only one of them names is taken from that one. A difference is logged.

    Raises:
        DataError: a file is not of this form.
    """
    config, map_ = _read(folder / CONFIG), _read(folder / MAP)
    files = [(CONFIG, config), (MAP, map_)]
    first, second = files if "added_tokens_decoder" in config else files[::-1]
    named: dict[str, str | None] = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        given = [(file, _content(folder / file, key, values[key])) for file, values in (first, second) if key in values]
        if given:
            named[key] = given[0][1]
            if given[0][1] is None and len(given) > 1:
                named[key] = given[1][1]
            elif len(given) > 1 and given[1][1] not in (None, given[0][1]):
                (file, content), (other_file, other) = given
                warn(f"{folder}: {key} is '{content}' in {file} and '{other}' in {other_file}; '{content}' is used")
    added: dict[int, AddedToken] = {}
    for id, value in _mapping(folder / CONFIG, "added_tokens_decoder", config.get("added_tokens_decoder")).items():
        added[int(id)] = _token(folder / CONFIG, "added_tokens_decoder", value, special=False)
    if "added_tokens_decoder" not in config:
        for content, id in _read(folder / ADDED).items():
            if not isinstance(id, int):
                raise DataError(f"{folder / ADDED}: '{content}' must have a number, got {id!r}")
            added[id] = AddedToken(content, special=content in named.values())
    others = [
        _token(folder / file, key, value)
        for file, values in (first, second)
        for key in ("additional_special_tokens", "extra_special_tokens")
        for value in _listed(values.get(key))
    ]
    known = {token.content for token in added.values()}
    return SpecialTokens(named, added, [token for token in dict.fromkeys(others) if token.content not in known])


def own_code(folder: Path) -> str | None:
    """The class that the folder's files name as the tokenizer's own code, such as "tokenization_x.XTokenizer"."""
    for name in (CONFIG, "config.json"):
        auto_map = _read(folder / name).get("auto_map")
        if isinstance(auto_map, dict) and "AutoTokenizer" in auto_map:
            value = auto_map["AutoTokenizer"]
            names = [name for name in (value if isinstance(value, list) else [value]) if name]
            return ", ".join(map(str, names))
    return None


def stop_ids(folder: Path) -> tuple[int, ...]:
    """The ids at which generation stops, by generation_config.json in `folder`; empty if it names none.

    Raises:
        DataError: the file is not of this form.
    """
    return eos_ids(_read(folder / GENERATION), str(folder / GENERATION))


def eos_ids(values: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """The ids under `eos_token_id` of a config: one, a list of them, or none.

    Raises:
        DataError: it is something else.
    """
    value = values.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(not isinstance(id, int) or isinstance(id, bool) or id < 0 for id in ids):
        raise DataError(f"{where}: eos_token_id must be an id or a list of ids, got {value!r}")
    return tuple(ids)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values


def _mapping(path: Path, key: str, value: Any) -> dict[str, Any]:
    if value is not None and not (isinstance(value, dict) and all(id.isdigit() for id in value)):
        raise DataError(f"{path}: {key} must map ids to tokens, got {value!r}")
    return value or {}


def _listed(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _content(path: Path, key: str, value: Any) -> str | None:
    return None if value is None else _token(path, key, value).content


def _token(path: Path, key: str, value: Any, special: bool = True) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {name: bool(value.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
        return AddedToken(value["content"], **flags, special=bool(value.get("special", special)))
    raise DataError(f"{path}: {key} must be a token, got {value!r}")


def warn(text: str) -> None:
    """Log a warning about a tokenizer's files once: not in the worker processes that read the same files again."""
    if parent_process() is None:
        logger.warning("%s", text)
