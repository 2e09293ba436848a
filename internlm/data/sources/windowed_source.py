"""The samples of files, a few files at a time, for data that the local disk cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from internlm.data.file_windows import FileWindows
from internlm.data.packing.sample import Sample
from internlm.data.sources.document_source import DocumentSource
from internlm.data.sources.sample_stream import ShuffledSource


class WindowedSource(ShuffledSource):
    """The samples of files in the order of `FileWindows`; the files of the next window are fetched ahead.

    Args:
        source: of the files.
        seed: of the order.
        num_files: files whose samples are mixed at a time.
    """

    def __init__(self, source: DocumentSource, seed: int, num_files: int) -> None:
        super().__init__(source, seed)
        self._documents, self._num_files = source, num_files
        self._windows = FileWindows(np.diff(source.file_ends, prepend=0), num_files, seed)
        self._window: tuple[int, int] | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        """Those of `ShuffledSource`, and the number of files."""
        return {**super().facts, "shuffle_files": self._num_files}

    def sample(self, index: int) -> Sample:
        """See `SampleStream`."""
        epoch, place = divmod(index, len(self.source))
        window = epoch, self._windows.window_at(epoch, place)
        if window != self._window:
            self._window = window
            self._documents.fetch_ahead(self._windows.files_from(*window))
        return self.source.sample(int(self._windows.items(epoch, np.array([place]))[0]), epoch)
