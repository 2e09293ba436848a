"""Builds the training loader and the valid loaders of one data rank from a config."""

from __future__ import annotations

from internlm.config.schema import Config
from internlm.core.context.parallel_context import ParallelContext
from internlm.data.documents.document_file import FileFormat
from internlm.data.loaders.train_loader import TrainLoader, build_train_loader
from internlm.data.loaders.valid_loader import ValidLoader, build_valid_loaders
from internlm.data.megatron_files.file_format import MEGATRON
from internlm.data.packing.sample import Packing
from internlm.data.sources.open_source import open_source
from internlm.data.sources.sample_stream import ShuffledSource
from internlm.data.token_arrays.file_format import ArrayFormat
from internlm.data.tokenized_files.file_format import TOKENIZED


def build_loader(config: Config, context: ParallelContext) -> TrainLoader:
    """Build the training loader of this data rank."""
    data = config.data
    source = open_source(
        data.train_folder,
        seq_len=data.seq_len,
        micro_bsz=data.micro_bsz,
        packing=packing(config),
        vocab_size=config.model.vocab_size,
        seed=data.seed,
        min_length=data.min_length,
        min_length_dict=data.min_length_dict,
        skip_bad_documents=data.skip_bad_documents,
        fixed_random_dataset_seqlen=data.fixed_random_dataset_seqlen,
        format=file_format(config),
    )
    return build_train_loader(
        ShuffledSource(source, data.seed),
        micro_num=data.micro_num,
        data_rank=context.index("data"),
        data_size=context.size("data"),
        num_workers=data.num_worker,
        rampup_batch_size=data.rampup_batch_size,
        skip_batches=data.skip_batches,
        total_steps=data.total_steps,
        pin_memory=context.device.type == "cuda",
    )


def file_format(config: Config) -> FileFormat:
    """The format of the files in the folders of a config."""
    data = config.data
    formats: tuple[FileFormat, ...] = (TOKENIZED, MEGATRON, ArrayFormat(data.array_dtype, data.array_separator))
    return next(each for each in formats if each.name == data.type)


def packing(config: Config) -> Packing:
    """How samples are made from documents."""
    if not config.data.use_packed_dataset:
        return "unpacked"
    return "pack_sample_into_one" if config.data.pack_sample_into_one else "cut"


def build_valid_sets(config: Config, context: ParallelContext) -> dict[str, ValidLoader]:
    """Build a loader of this data rank's part of every valid set; empty when evaluation is off."""
    data = config.data
    if data.valid_every == 0:
        return {}
    return build_valid_loaders(
        data.valid_folder,
        seq_len=data.seq_len,
        micro_bsz=data.micro_bsz,
        vocab_size=config.model.vocab_size,
        valid_micro_num=data.valid_micro_num,
        data_rank=context.index("data"),
        data_size=context.size("data"),
        packed=data.use_packed_dataset,
        format=file_format(config),
    )
