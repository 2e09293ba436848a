"""Special tokens named in a tokenizer's folder: tokenizer_config.json, special_tokens_map.json, added_tokens.json.

Owns the precedence of the files, by the rules of transformers. Must not know the vocabulary: the tokenizer checks that
the tokens exist.
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
    """A token that is matched literally in the text, before normalization and splitting.

    Attributes:
        content: its text.
        lstrip, rstrip: whether a match includes white space before / after it.
        single_word: whether matches inside words are excluded.
        special: whether decoders may omit it.
    """

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    special: bool = True


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens that the files of a folder name.

    Attributes:
        named: bos_token, eos_token, pad_token and unk_token, as far as a file names them; None where it is null.
        added: id -> token, for tokens added to the vocabulary and special tokens.
        others: further special tokens, named without an id.
    """

    named: Mapping[str, str | None] = field(default_factory=dict)
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    others: Sequence[AddedToken] = ()

    def token_id(self, key: str, ids: Mapping[str, int], where: str) -> int | None:
        """Look up the id of a token in `named`; None if the token is null.

        Args:
            key: "bos_token" or "eos_token".
            ids: token -> id, for the whole vocabulary.
            where: path of the tokenizer, for messages.

        Raises:
            DataError: the vocabulary lacks the token.
        """
        content = self.named[key]
        if content is None:
            return None
        if content not in ids:
            raise DataError(
                f"{where}: {key} is '{content}', but the vocabulary has no such token; name one of its tokens "
                f"in {CONFIG} ({MAP} is used for what that does not name)"
            )
        return ids[content]


def read_special_tokens(folder: Path) -> SpecialTokens:
    """Read the special tokens that the files in `folder` name; empty if there is no such file.

    special_tokens_map.json takes precedence over tokenizer_config.json, unless the latter lists `added_tokens_decoder`,
    which shows that it is the newer file. A token that only one of them names comes from that one. Differences are
    logged.

    Raises:
        DataError: a file is malformed.
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
                raise DataError(f"{folder / ADDED}: the id of '{content}' must be an integer, got {id!r}")
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
    """The class of custom tokenizer code that the folder names, such as "tokenization_x.XTokenizer"; None without."""
    for name in (CONFIG, "config.json"):
        auto_map = _read(folder / name).get("auto_map")
        if isinstance(auto_map, dict) and "AutoTokenizer" in auto_map:
            value = auto_map["AutoTokenizer"]
            names = [name for name in (value if isinstance(value, list) else [value]) if name]
            return ", ".join(map(str, names))
    return None


def stop_ids(folder: Path) -> tuple[int, ...]:
    """Read the ids that stop generation from generation_config.json in `folder`; empty if it names none.

    Raises:
        DataError: the file is malformed.
    """
    return eos_ids(_read(folder / GENERATION), str(folder / GENERATION))


def eos_ids(values: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Return the ids in `eos_token_id` of a config, which may be an id, a list of ids, or absent.

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
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: must be a JSON object, got {type(values).__name__}")
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
    """Log a warning about the files of a tokenizer, except in worker processes, which load the same files again."""
    if parent_process() is None:
        logger.warning("%s", text)
