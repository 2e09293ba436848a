"""Builds the training loader and the valid loaders of one data rank from a config."""

from __future__ import annotations

from collections.abc import Sequence

from internlm.config.schema import BlendEntryConfig, Config
from internlm.core.context.parallel_context import ParallelContext
from internlm.data.loaders.train_loader import TrainLoader, build_train_loader
from internlm.data.loaders.valid_loader import ValidLoader, build_valid_loaders
from internlm.data.packing.fill_in_the_middle import FillInTheMiddle
from internlm.data.sources.blend import BlendedStream
from internlm.data.sources.blend_members import BlendGroup, BlendSource
from internlm.data.sources.document_source import DocumentSource
from internlm.data.sources.open_source import open_source
from internlm.data.sources.replay_stream import ReplayStream
from internlm.data.sources.sample_stream import SampleStream, ShuffledSource
from internlm.data.sources.windowed_source import WindowedSource
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.initialize.data_folders import check_same_listing, check_same_on_all_ranks, log_small_cache, train_folder
from internlm.initialize.file_formats import file_format
from internlm.initialize.images import image_loader, image_settings
from internlm.initialize.row_stream import build_row_stream
from internlm.initialize.train_sources import config_of, train_sources
from internlm.initialize.valid_sets import find_sets, log_unread_valid_files
from internlm.utils.errors import ConfigError, nearest
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


def build_loader(config: Config, context: ParallelContext) -> TrainLoader:
    """Build the training loader of this data rank."""
    data = config.data
    return build_train_loader(
        build_stream(config, context),
        micro_num=data.micro_num,
        data_rank=context.index("data"),
        data_size=context.size("data"),
        num_workers=data.num_worker,
        rampup_batch_size=data.rampup_batch_size,
        skip_batches=data.skip_batches,
        total_steps=data.total_steps,
        pin_memory=context.device.type == "cuda",
        images=image_loader(config),
    )


def build_stream(config: Config, context: ParallelContext) -> SampleStream:
    """Build the stream of training samples: of `data.blend`, or of one source."""
    if not config.data.blend:
        return open_stream(config, context)
    num_ranks = context.size("data")
    if num_ranks > 1 and any(source.config.data.type == "streaming" for source in train_sources(config)):
        logger.warning(
            "data.blend has rows that are tokenized during training: the samples of a shard fall to any of %d data "
            "ranks, so each row is tokenized up to %d times; `internlm data tokenize` does it once",
            num_ranks, num_ranks,
        )  # fmt: skip
    return BlendedStream(_members(config, config.data.blend, context))


def _members(
    config: Config, entries: Sequence[BlendEntryConfig], context: ParallelContext
) -> list[BlendSource | BlendGroup]:
    members: list[BlendSource | BlendGroup] = []
    for entry in entries:
        if entry.blend:
            members.append(BlendGroup(entry.steps, _members(config, entry.blend, context)))
        else:
            assert entry.name is not None
            stream = open_stream(config_of(config, entry), context)
            members.append(BlendSource(entry.name, stream, entry.steps, entry.epochs_max, entry.on_end or "repeat"))
    return members


def open_stream(config: Config, context: ParallelContext) -> SampleStream:
    """Open the stream of one source, that of `data.train_folder`; collective.

    Raises:
        DataError: the data are missing or malformed, or ranks have found different data.
        ConfigError: keys of the config do not fit the data.
    """
    check_same_listing(config, context)
    stream = _open_stream(config, context)
    facts = {"types": stream.type_names, "samples of an epoch": stream.samples_per_epoch, **stream.facts}
    check_same_on_all_ranks(context, f"{config.data.train_folder}", facts)
    return stream


def _open_stream(config: Config, context: ParallelContext) -> SampleStream:
    data = config.data
    if data.type == "streaming":
        return build_row_stream(config, context, fill_in_the_middle(config))
    if data.type == "mocked":
        return build_replay_stream(config, context)
    source = open_source(
        train_folder(config),
        seq_len=data.seq_len,
        micro_bsz=data.micro_bsz,
        packing=data.packing,
        vocab_size=config.model.vocab_size,
        seed=data.seed,
        min_length=data.min_length,
        min_length_dict=data.min_length_dict,
        skip_bad_documents=data.on_bad_data == "skip",
        fixed_random_dataset_seqlen=data.fixed_random_dataset_seqlen,
        format=file_format(config),
        document_mask=data.document_mask,
        fim=fill_in_the_middle(config),
        valid_fraction=data.valid_fraction,
        images=image_settings(config),
    )
    if isinstance(source, DocumentSource):
        log_small_cache(config, source.paths)
        if data.shuffle_files is not None:
            return WindowedSource(source, data.seed, data.shuffle_files)
    return ShuffledSource(source, data.seed)


def build_replay_stream(config: Config, context: ParallelContext) -> ReplayStream:
    """Build the stream of the recorded batches of data.train_folder.

    Raises:
        DataError: a file is missing or malformed.
        ConfigError: the run has more steps than the recording.
    """
    data = config.data
    folder = train_folder(config)
    assert folder is not None
    stream = ReplayStream(
        folder,
        seq_len=data.seq_len,
        micro_bsz=data.micro_bsz,
        rows_per_step=data.micro_num * data.micro_bsz * context.size("data"),
        packing=data.packing,
        vocab_size=config.model.vocab_size,
    )
    if data.total_steps > stream.num_steps:
        raise ConfigError(
            f"data.total_steps = {data.total_steps}, but {data.train_folder} has {stream.num_steps} recorded steps; "
            f"set data.total_steps = {stream.num_steps}"
        )
    return stream


def fill_in_the_middle(config: Config) -> FillInTheMiddle | None:
    """The fill-in-the-middle of a config, with the ids of its tokens; None if it is off.

    Raises:
        ConfigError: a token is not in the vocabulary of the tokenizer, or two sentinels are one token.
        DataError: the tokenizer cannot be read.
    """
    data, fim = config.data, config.data.fim
    if fim is None:
        return None
    tokens = {name: getattr(fim, name) for name in ("prefix", "middle", "suffix", "bos", "eos")}
    if any(isinstance(token, str) for token in tokens.values()):
        assert data.tokenizer_path is not None
        tokenizer = load_tokenizer(data.tokenizer_path)
        ids = {piece: number for number, piece in enumerate(tokenizer.pieces()) if piece}
        ends = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
        for name, token in tokens.items():
            if name in ends and token == "tokenizer":
                tokens[name] = ends[name]
            elif isinstance(token, str):
                if token not in ids:
                    raise ConfigError(
                        f"data.fim.{name} = {token!r} is not a token of {data.tokenizer_path}; give an id, or add it "
                        f"to the tokenizer.{nearest(token, ids)}"
                    )
                tokens[name] = ids[token]
    sentinels = [tokens[name] for name in ("prefix", "middle", "suffix")]
    if len(set(sentinels)) < len(sentinels):
        raise ConfigError(f"data.fim.prefix, middle and suffix have the ids {sentinels}: give three different tokens")
    return FillInTheMiddle(rate=fim.rate, spm_rate=fim.spm_rate, level=fim.level, seed=data.seed, **tokens)


def build_valid_sets(config: Config, context: ParallelContext) -> dict[str, ValidLoader]:
    """Build a loader of this data rank's part of every valid set; empty when evaluation is off."""
    data = config.data
    log_unread_valid_files(config)
    sets = build_valid_loaders(
        find_sets(config),
        seq_len=data.seq_len,
        micro_bsz=data.micro_bsz,
        vocab_size=config.model.vocab_size,
        valid_micro_num=data.valid_micro_num,
        data_rank=context.index("data"),
        data_size=context.size("data"),
        packed=data.packing != "unpacked",
        images=image_loader(config),
    )
    check_same_on_all_ranks(
        context, "the validation sets", {f"tokens of '{name}'": each.num_tokens for name, each in sets.items()}
    )
    return sets
