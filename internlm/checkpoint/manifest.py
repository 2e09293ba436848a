"""The manifest of a checkpoint: the file `<step>.step` that completes it, with size and checksum of every other file.

A folder without a manifest is not a checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field

from internlm.checkpoint.dcp_storage import FileChecksum, file_checksum
from internlm.checkpoint.internevo import refuse_internevo
from internlm.utils.errors import CheckpointError, StorageError
from internlm.utils.json_text import json_object
from internlm.utils.storage import StoragePath

FORMAT = 1
"""Version of the checkpoint format."""

WHOLE_RUN = ("model", "optimizer", "scheduler", "sampler")
"""The parts of a complete checkpoint of a run."""

MANIFEST_SUFFIX = ".step"


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    Attributes:
        step: step of the checkpoint.
        contents: the parts of `WHOLE_RUN` that it contains.
        files: file name (with folders, below the checkpoint) -> size and checksum.
        saved_at: seconds since 1970, by the clock of the main rank.
    """

    step: int
    contents: tuple[str, ...]
    files: dict[str, FileChecksum]
    saved_at: float = field(default_factory=time.time, compare=False)

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.step}{MANIFEST_SUFFIX}"

    def text(self) -> str:
        """Content of its file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)


def manifest_name(path: StoragePath) -> str | None:
    """File name of a folder's manifest: `<folder>.step`, else (in a snapshot) any; None if there is none."""
    names = [
        name for name in path.names() if name.endswith(MANIFEST_SUFFIX) and name.removesuffix(MANIFEST_SUFFIX).isdigit()
    ]
    own = f"{path.name}{MANIFEST_SUFFIX}"
    return own if own in names else min(names, default=None)


def read_manifest(path: StoragePath) -> Manifest | None:
    """The manifest of a checkpoint; None without one, as after a save that did not finish.

    Raises:
        CheckpointError: the manifest is damaged, or of a later version.
        StorageError: the storage cannot be read.
    """
    name = manifest_name(path)
    if name is None:
        return None
    try:
        values = json_object((path / name).read_text())
        if values["format"] != FORMAT:
            raise CheckpointError(
                f"'{path}' has checkpoint format {values['format']}, and this version reads {FORMAT}: use the version "
                f"of internlm that wrote it"
            )
        files = {name: FileChecksum(**values) for name, values in values["files"].items()}
        return Manifest(int(values["step"]), tuple(values["contents"]), files, float(values["saved_at"]))
    except StorageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        refuse_internevo(path)
        raise CheckpointError(
            f"the manifest '{path / name}' is damaged ({type(error).__name__}: {error}): use another step"
        ) from error


def check_contents(path: StoragePath, manifest: Manifest, wanted: Collection[str]) -> None:
    """Raise CheckpointError if the checkpoint lacks a requested part."""
    absent = set(wanted) - set(manifest.contents)
    if absent:
        raise CheckpointError(
            f"the checkpoint '{path}' contains only {', '.join(manifest.contents)}, not {', '.join(sorted(absent))}: "
            f"set the content to load to {manifest.contents}"
        )


def find_damage(path: StoragePath, manifest: Manifest, share: int = 0, num_shares: int = 1) -> list[str]:
    """Compare the files of a checkpoint with its manifest.

    Args:
        path: the checkpoint.
        manifest: its manifest.
        share: number of this share.
        num_shares: check only every `num_shares`-th file, starting at file number `share`.

    Returns:
        One line for each file that is missing or differs from what was written.
    """
    return list(_damage(path, manifest, share, num_shares))


def _damage(path: StoragePath, manifest: Manifest, share: int, num_shares: int) -> Iterator[str]:
    # Large files first, so that all shares are of similar size.
    by_size = sorted(manifest.files.items(), key=lambda item: (-item[1].size, item[0]))
    for name, expected in by_size[share::num_shares]:
        try:
            if not (path / name).exists():
                yield f"{name} is missing"
                continue
            found = file_checksum(path / name)
        except StorageError as error:
            yield f"{name} cannot be read: {error}"
            continue
        if found.size != expected.size:
            yield f"{name} has {found.size:,} bytes, but {expected.size:,} were written"
        elif found != expected:
            yield f"{name} has checksum {found.xxh3}, but {expected.xxh3} was written"
