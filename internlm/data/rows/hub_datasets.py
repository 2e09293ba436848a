"""Finds a dataset by its name: in the local cache of Hugging Face, and otherwise on the network."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from internlm.data.remote.mirror import local_folder
from internlm.data.rows.dataset_layout import missing_shards
from internlm.data.rows.open_rows import row_format
from internlm.utils.errors import DataError
from internlm.utils.logging import get_logger

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILES = ["README.md", "*.json", "*.parquet", "*.arrow", "*.jsonl*", "*.ndjson*", "*.json.*", "*.txt*"]
"""What is downloaded; repositories also have images and archives."""

logger = get_logger(__name__)


def locate_dataset(folder_or_name: str | Path, revision: str | None = None) -> Path:
    """The folder of a dataset, downloaded if it has to be.

    Args:
        folder_or_name: an existing folder or file; the URL of one, see `local_folder`; or the name of a dataset, such
            as "roneneldan/TinyStories".
        revision: branch, tag or commit of a dataset with a name.

    Raises:
        DataError: neither a folder nor the name of a dataset that the cache or the network has.
    """
    folder = Path(local_folder(folder_or_name))
    if folder.exists():
        return folder
    name = str(folder_or_name)
    if not _NAME.fullmatch(name):
        raise DataError(f"{name}: no such file or folder")
    try:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise DataError(
            f"{name}: no such folder; for a dataset of this name, pip install huggingface_hub, or download it with "
            f"`hf download --repo-type dataset {name} --local-dir FOLDER`"
        ) from error
    local: Path | None = None
    with contextlib.suppress(LocalEntryNotFoundError):
        local = Path(
            huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
        )
    if local is not None and _is_complete(local):
        logger.info(
            "%s: read from the cache of Hugging Face, %s; the network is not asked for a newer one", name, local
        )
        return local
    return _download(name, revision, local)


def _is_complete(snapshot: Path) -> bool:
    names = [
        path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if row_format(path) and path.is_file()
    ]
    return any(row_format(name) != "json" or len(names) == 1 for name in names) and not missing_shards(names)


def _download(name: str, revision: str | None, local: Path | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    there = f"only a part of it is in the cache ({local})" if local else "not in the cache of Hugging Face"
    advice = (
        f"Download it where there is a network, `hf download --repo-type dataset {name} --local-dir FOLDER`, and set "
        "data.train_folder to FOLDER"
    )
    logger.info("%s: no such folder, and %s; downloading the dataset", name, there)
    try:
        folder = Path(
            huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=_FILES)
        )
    except errors.GatedRepoError as error:
        raise DataError(
            f"{name}: accept the terms of this dataset at https://huggingface.co/datasets/{name}, and set HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        version = f" with a revision '{revision}'" if revision else ""
        raise DataError(
            f"{name}: neither a folder nor a dataset of Hugging Face{version}; a private one needs HF_TOKEN"
        ) from error
    except Exception as error:
        problem = _problem_of(error)
        if problem is None:
            raise
        raise DataError(f"{name}: no such folder, {there}, and {problem} ({_first_line(error)}). {advice}") from error
    if folder == local and not _is_complete(folder):
        # Without a network, what the cache has is returned.
        raise DataError(
            f"{name}: no such folder, {there}, and the network cannot be reached or has no more of it. {advice}"
        )
    logger.info("%s: downloaded to %s", name, folder)
    return folder


def _problem_of(error: BaseException) -> str | None:
    """Why a download failed; None for an error that comes from neither the network nor the disk."""
    from huggingface_hub import errors

    # The library of the transport depends on the version of huggingface_hub.
    is_transport = type(error).__module__.split(".", 1)[0] in ("httpx", "httpcore", "requests", "urllib3")
    if is_transport or isinstance(error, errors.LocalEntryNotFoundError | ConnectionError):
        return "the network cannot be reached"
    return "it cannot be downloaded" if isinstance(error, OSError) else None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0] or type(error).__name__
