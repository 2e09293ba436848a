"""Prints the n-th global sample of a run, for `internlm data inspect --config`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from internlm.config.loader import load_config
from internlm.core.context.parallel_context import ParallelContext
from internlm.data.packing.collate import to_micro_batch
from internlm.data.sources.blend import BlendedStream
from internlm.data.sources.sample_stream import SampleStream
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tools.sample_text import describe_sample
from internlm.initialize.build import build_layout
from internlm.initialize.build_data import build_stream
from internlm.initialize.images import image_loader
from internlm.utils.errors import UserError

# The layout of the run, which may need more ranks than one.
_ALONE: dict[str, object] = {"parallel": {}}


def print_sample(config_path: Path, overrides: Sequence[str], number: int, output: TextIO) -> int:
    """Print sample `number` of a config, as its run reads it; returns the exit code.

    Raises:
        UserError: `number` is negative.
        ConfigError, DataError: the config or its data is wrong.
    """
    if number < 0:
        raise UserError(f"--sample {number}: must be at least 0")
    config = load_config(config_path, overrides, options={"--sample": _ALONE}).config
    context = ParallelContext(build_layout(config, 1), 0, torch.device("cpu"))
    stream = build_stream(config, context)
    sample, images = stream.sample(number), image_loader(config)
    names = [source.name for placed in sample.images_at for source in placed.sources]
    if images is not None:
        sample = images.complete(sample)
    micro = to_micro_batch(sample)
    tokenizer = load_tokenizer(config.data.tokenizer_path) if config.data.tokenizer_path is not None else None
    types = sorted({stream.type_names[index] for index in micro.type_ids.unique().tolist()})
    if config.data.type == "streaming" and config.data.num_shards is None:
        ranks = f"a run that starts with {config.data.micro_num:,} samples a step over all data ranks"
        print(f"rows are dealt as in {ranks}; --set data.num_shards=N for 8 times those of another run", file=output)
    print(f"sample {number:,}: {_place(stream, number)}type {', '.join(types)}", file=output)
    notation = "dimmed" if output.isatty() else "in ⟦⟧"
    print(f"tokens that are never a label are {notation}", file=output)
    if tokenizer is None:
        print("token ids, as data.tokenizer_path is not set", file=output)
    lines = describe_sample(micro, None if tokenizer is None else tokenizer.decode, output.isatty(), names)
    print("\n".join(lines), file=output)
    return 0


def _place(stream: SampleStream, number: int) -> str:
    """Source and epoch of a sample, as far as they are known."""
    name = ""
    if isinstance(stream, BlendedStream):
        source, number = stream.source_at(number)
        name = f"sample {number:,} of source {source}; "
        stream = next(each.stream for each in stream.sources if each.name == source)
    per_epoch = stream.samples_per_epoch
    epoch = f"epoch {number // per_epoch + 1} of {per_epoch:,} samples each; " if per_epoch is not None else ""
    return name + epoch
