"""Replays recorded batches, token by token: `data.type = "mocked"`, as InternEvo's parity tests record them.

The ids of step i on data rank r are the tensor `tokens_step{i}_dp{r}.pt`, int [rows, seq_len], its labels
`labels_step{i}_dp{r}.pt`, with -100 where there is none; steps count from 1, ranks from 0. Names may have a common
prefix. The rows of a step are those of all its files, by number of the rank, and are dealt to the micro-batches of this
run in that order, whatever the number of ranks. Each row is an attention segment of its own. Labels are not shifted.
"""

from __future__ import annotations

import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from internlm.data.batch import IGNORE_INDEX
from internlm.data.packing.document_slice import DocumentSlice
from internlm.data.packing.sample import Packing, Sample, concatenate_slices, padding_sample, stack_slices
from internlm.data.remote.local_file import find_mirrored, local_file
from internlm.data.sources.sample_stream import StatelessStream, StreamEndError
from internlm.utils.errors import DataError, RemoteDataError

_NAME = re.compile(r"(?P<prefix>.*?)_?(?P<kind>tokens|labels)_step(?P<step>\d+)_dp(?P<rank>\d+)(\.\w+)?")
_CACHED_STEPS = 2
_MAX_CHECKED = 1000
"""Pairs of files that `ReplayStream.check` opens; takes about a second."""
_Rows = tuple[NDArray[np.int64], NDArray[np.int64]]


class ReplayStream(StatelessStream):
    """The rows of recorded steps as a `SampleStream`, in their order.

    Args:
        place: the folder of the files, or their common prefix.
        seq_len: tokens of a row.
        micro_bsz: rows of a sample.
        rows_per_step: rows of every step, over all ranks.
        packing: "unpacked" makes samples of shape [micro_bsz, seq_len], all others packed ones.
        vocab_size: ids must be smaller.

    Raises:
        DataError: files are missing, or those of the first step are malformed.
    """

    def __init__(
        self, place: str | Path, *, seq_len: int, micro_bsz: int, rows_per_step: int, packing: Packing, vocab_size: int
    ) -> None:
        self.type_names = ["mocked"]
        self._seq_len, self._micro_bsz, self._packing, self._vocab_size = seq_len, micro_bsz, packing, vocab_size
        self._rows_per_step = rows_per_step
        self._place, self._files = place, _find_files(Path(place))
        self._cache: OrderedDict[int, _Rows] = OrderedDict()
        self._step_rows(0)

    @property
    def num_steps(self) -> int:
        """Number of recorded steps."""
        return len(self._files)

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `SampleStream`."""
        return {
            "type": "mocked",
            "num_steps": self.num_steps,
            "rows_per_step": self._rows_per_step,
            "seq_len": self._seq_len,
            "micro_bsz": self._micro_bsz,
        }

    @property
    def samples_per_epoch(self) -> None:
        """There are no epochs: a recording is read once."""
        return None

    def sample(self, index: int) -> Sample:
        """See `SampleStream`."""
        step, place = divmod(index * self._micro_bsz, self._rows_per_step)
        if step >= self.num_steps:
            raise StreamEndError(f"the recording ends after step {self.num_steps}, which has been read")
        ids, labels = (values[place : place + self._micro_bsz] for values in self._step_rows(step))
        slices = [DocumentSlice(*row) for row in zip(ids, labels, strict=True)]
        if self._packing == "unpacked":
            return stack_slices(slices, self._seq_len, self._micro_bsz, type_id=0)
        return concatenate_slices(slices, self._seq_len, ids.size, "cut", 0)

    def padding(self) -> Sample:
        """See `SampleStream`."""
        packing: Packing = "unpacked" if self._packing == "unpacked" else "cut"
        return padding_sample(self._seq_len, self._micro_bsz, packing)

    def check(self) -> str:
        """Check the shape and dtype of recorded tensors, at equal intervals over all steps, without reading their rows.

        Of files in an object store, only those of the first step are read.

        Returns:
            A line that says what was checked.

        Raises:
            DataError: a file is not a tensor of [rows, seq_len] integers, or a step has another number of rows.
        """
        stride = -(-self.num_steps * len(self._files[0]) // _MAX_CHECKED)
        chosen = range(0, self.num_steps, stride)
        if find_mirrored(self._files[0][0][0]) is not None:
            chosen = range(1)
        for step in chosen:
            num_rows = 0
            for tokens_path, labels_path in self._files[step]:
                shapes = [tuple(self._load(path).shape) for path in (tokens_path, labels_path)]
                _check_same_shape(tokens_path, labels_path, *shapes)
                num_rows += shapes[0][0]
            self._check_rows(step, num_rows)
        return (
            f"recording '{self._place}': {self.num_steps:,} steps of {self._rows_per_step:,} rows, of which "
            f"{len(chosen):,} were checked for shape and dtype"
        )

    def _check_rows(self, step: int, num_rows: int) -> None:
        if num_rows != self._rows_per_step:
            raise DataError(
                f"{self._files[step][0][0]}: step {step + 1} has {num_rows} recorded rows, but data.micro_num * "
                f"data.micro_bsz * data ranks = {self._rows_per_step}: set them to the recorded global batch"
            )

    def _step_rows(self, step: int) -> _Rows:
        """Ids and labels of a step, counted from 0: both int64 [rows_per_step, seq_len]."""
        if step not in self._cache:
            parts = [self._read(tokens, labels) for tokens, labels in self._files[step]]
            ids, labels = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
            self._check_rows(step, len(ids))
            self._cache[step] = ids, labels
            if len(self._cache) > _CACHED_STEPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(step)
        return self._cache[step]

    def _read(self, tokens_path: Path, labels_path: Path) -> _Rows:
        ids, labels = (self._load(path).numpy().astype(np.int64) for path in (tokens_path, labels_path))
        _check_same_shape(tokens_path, labels_path, ids.shape, labels.shape)
        for path, values, wrong in (
            (tokens_path, ids, (ids < 0) | (ids >= self._vocab_size)),
            (labels_path, labels, (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= self._vocab_size))),
        ):
            if wrong.any():
                row, column = (int(index[0]) for index in np.nonzero(wrong))
                raise DataError(
                    f"{path}: {values[row, column]} in row {row}, column {column}, is outside the vocabulary of "
                    f"{self._vocab_size}; set model.vocab_size to that of the recorded run"
                )
        return ids, labels

    def _load(self, path: Path) -> torch.Tensor:
        """A recorded tensor, integers [rows, seq_len], memory-mapped where its file allows that."""
        try:
            with local_file(path) as content:
                is_archive = zipfile.is_zipfile(content)
                tensor = torch.load(content, map_location="cpu", weights_only=True, mmap=is_archive)
        except RemoteDataError:
            raise
        except Exception as error:  # zipfile, pickle and torch each raise their own
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise DataError(f"{path}: not a tensor as torch.save writes it ({reason}); record it again") from error
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != 2 or tensor.is_floating_point():
            found = (
                f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            )
            raise DataError(f"{path}: {found}; expected integers of shape [rows, seq_len]")
        if tensor.shape[1] != self._seq_len:
            raise DataError(f"{path}: rows of {tensor.shape[1]} tokens, but data.seq_len = {self._seq_len}")
        return tensor


def _check_same_shape(tokens_path: Path, labels_path: Path, ids: tuple[int, ...], labels: tuple[int, ...]) -> None:
    if ids != labels:
        raise DataError(f"{labels_path} has shape {labels}, and {tokens_path.name} has {ids}")


def _find_files(place: Path) -> list[list[tuple[Path, Path]]]:
    """(ids, labels) of each rank, by step.

    Raises:
        DataError: there are none, or one is missing.
    """
    folder, prefix = (place, None) if place.is_dir() else (place.parent, place.name.rstrip("_"))
    expected = "tokens_step1_dp0.pt and labels_step1_dp0.pt, and so on for every step and data rank"
    if not folder.is_dir():
        raise DataError(f"{place}: no such folder; expected the folder, or the common prefix, of {expected}")
    found: dict[str, dict[tuple[str, int, int], Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match is not None and prefix in (None, match["prefix"]):
            key = match["kind"], int(match["step"]), int(match["rank"])
            other = found.setdefault(match["prefix"], {}).setdefault(key, path)
            if other is not path:
                raise DataError(f"{path}: {other.name} is the same step and rank; remove one of them")
    if not found:
        raise DataError(f"{place}: no recorded batches; expected {expected}")
    if len(found) > 1:
        names = ", ".join(str(folder / name) for name in sorted(found))
        raise DataError(f"{place}: recordings with several prefixes; name one of them in data.train_folder: {names}")
    (files,) = found.values()
    steps = {step for _, step, _ in files}
    ranks = {rank for _, _, rank in files}
    for step in range(1, max(steps) + 1):
        for rank in range(max(ranks) + 1):
            for kind in ("tokens", "labels"):
                if (kind, step, rank) not in files:
                    raise DataError(
                        f"{place}: {kind}_step{step}_dp{rank} is missing, of {max(steps)} steps and "
                        f"{max(ranks) + 1} data ranks"
                    )
    return [
        [(files["tokens", step, rank], files["labels", step, rank]) for rank in sorted(ranks)]
        for step in range(1, max(steps) + 1)
    ]
