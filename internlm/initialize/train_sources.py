"""The sources of training data that a config names, and how each is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from internlm.config.schema import BlendEntryConfig, Config, DataConfig
from internlm.data.documents.document_file import FileFormat
from internlm.data.megatron_files.file_format import MEGATRON
from internlm.data.packing.fill_in_the_middle import FillInTheMiddle
from internlm.data.sources.blend import BlendedStream
from internlm.data.sources.blend_members import BlendGroup, BlendSource, source_seed
from internlm.data.sources.open_source import open_source
from internlm.data.sources.sample_stream import SampleStream, ShuffledSource
from internlm.data.token_arrays.file_format import ArrayFormat
from internlm.data.tokenized_files.file_format import TOKENIZED


@dataclass(frozen=True)
class TrainSource:
    """The settings of a source, of the data section or of an entry of `data.blend`.

    Attributes:
        key: of its path in the config.
        path: folder or file; None for dummy data.
        type: `data.type`.
        seed: of its order.
    """

    key: str
    path: str | None
    type: str
    min_length: int
    min_length_dict: Mapping[str, int] | None
    array_dtype: str | None
    array_separator: int | None
    content_name: str
    subset_name: str | None
    seed: int

    @property
    def format(self) -> FileFormat:
        """The format of its files of token ids."""
        formats: tuple[FileFormat, ...] = (TOKENIZED, MEGATRON, ArrayFormat(self.array_dtype, self.array_separator))
        return next(each for each in formats if each.name == self.type)


def train_sources(config: Config) -> list[TrainSource]:
    """All sources of training data: those of `data.blend`, or that of `data.train_folder`."""
    data = config.data
    if data.blend:
        return [_of_entry(data, entry, key) for key, entry in _sources_in(data.blend, "data.blend")]
    return [data_source(data)]


def data_source(data: DataConfig) -> TrainSource:
    """The source with the keys of the data section."""
    return TrainSource(
        "data.train_folder",
        data.train_folder,
        data.type,
        data.min_length,
        data.min_length_dict,
        data.array_dtype,
        data.array_separator,
        data.content_name,
        data.subset_name,
        data.seed,
    )


def open_stream(config: Config, source: TrainSource, fim: FillInTheMiddle | None) -> SampleStream:
    """Open the stream of the samples of one source.

    Raises:
        ConfigError, DataError: the data is missing or malformed, or contradicts the config.
    """
    data = config.data
    samples = open_source(
        source.path,
        seq_len=data.seq_len,
        micro_bsz=data.micro_bsz,
        packing=data.packing,
        vocab_size=config.model.vocab_size,
        seed=source.seed,
        min_length=source.min_length,
        min_length_dict=source.min_length_dict,
        skip_bad_documents=data.skip_bad_documents,
        fixed_random_dataset_seqlen=data.fixed_random_dataset_seqlen,
        format=source.format,
        document_mask=data.document_mask,
        fim=None if fim is None else replace(fim, seed=source.seed),
    )
    return ShuffledSource(samples, source.seed)


def open_train_stream(config: Config, fim: FillInTheMiddle | None) -> SampleStream:
    """Open the stream of all training data of a config.

    Raises:
        ConfigError, DataError: see `open_stream`.
    """
    data = config.data
    if not data.blend:
        return open_stream(config, data_source(data), fim)
    return BlendedStream(_open_members(config, data.blend, "data.blend", fim))


def _open_members(
    config: Config, entries: Sequence[BlendEntryConfig], key: str, fim: FillInTheMiddle | None
) -> list[BlendSource | BlendGroup]:
    members: list[BlendSource | BlendGroup] = []
    for number, entry in enumerate(entries):
        own_key = f"{key}[{number}]"
        if entry.blend:
            members.append(BlendGroup(entry.steps, _open_members(config, entry.blend, f"{own_key}.blend", fim)))
            continue
        assert entry.name is not None
        stream = open_stream(config, _of_entry(config.data, entry, own_key), fim)
        members.append(BlendSource(entry.name, stream, entry.steps, entry.epochs_max, entry.on_end or "repeat"))
    return members


def _sources_in(entries: Sequence[BlendEntryConfig], key: str) -> Iterator[tuple[str, BlendEntryConfig]]:
    for number, entry in enumerate(entries):
        if entry.blend:
            yield from _sources_in(entry.blend, f"{key}[{number}].blend")
        else:
            yield f"{key}[{number}]", entry


def _of_entry(data: DataConfig, entry: BlendEntryConfig, key: str) -> TrainSource:
    """A source of a blend; keys that the entry lacks have the values of the data section."""
    assert entry.name is not None
    given = {
        name: getattr(entry, name)
        for name in ("type", "min_length", "array_dtype", "array_separator", "content_name", "subset_name")
        if getattr(entry, name) is not None
    }
    return replace(
        data_source(data),
        key=f"{key}.path",
        path=entry.path,
        min_length_dict=entry.min_length_dict,
        seed=source_seed(data.seed, entry.name),
        **given,
    )
