"""The weight files of an InternEvo checkpoint, with uniform weight names and global layer numbers.

Knows names, ranks and stages; `internevo_folder` joins shards. Only tensors and plain values are unpickled.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.internevo import RANK_FILE
from internlm.convert.redundant import is_buffer
from internlm.utils.errors import CheckpointError

LAYER = re.compile(r"layers\.(\d+)\.(.+)")
"""Name of a weight in a layer: number of the layer, name within it."""

_OLDER_NAMES = (
    (re.compile(r"^(model|module)\."), ""),
    (re.compile(r"^blocks\."), "layers."),
    (re.compile(r"\.mixer\."), ".attention."),
    (re.compile(r"\.mlp\."), ".feed_forward."),
    (re.compile(r"\.norm1\."), ".attention_norm."),
    (re.compile(r"\.norm2\."), ".ffn_norm."),
    (re.compile(r"\.Wqkv\."), ".wqkv."),
    (re.compile(r"\.out_proj\."), ".wo."),
    (re.compile(r"\.fused_w1_w3\."), ".w13."),
    (re.compile(r"^embedding\."), "tok_embeddings."),
    (re.compile(r"\.word_embeddings\."), "."),
    (re.compile(r"^head\."), "output."),
    (re.compile(r"\.feed_forward\.moe_layer\.gate\.wg\."), ".feed_forward.router."),
    (re.compile(r"\.feed_forward\.residual_mlp\."), ".feed_forward.shared."),
    (re.compile(r"\.feed_forward\.coefficient\."), ".feed_forward.shared_gate."),
)
"""Weight names of the first InternLM, of older versions, and of mixtures of experts, as (pattern, replacement)."""

_ONLY_ON_ONE_RANK = re.compile(r".*\.(wo|w2)\.bias")
"""Biases of row-parallel layers. They are added once, so with tensor parallelism only rank 0 has them."""


@dataclass(frozen=True)
class RankShard:
    """A rank's shard of a weight, and the file that contains it."""

    file: str
    tensor: Tensor


class InternEvoFiles:
    """An InternEvo checkpoint folder.

    Args:
        folder: on a local disk, as its files are memory-mapped.
        num_chunks: model chunks per pipeline stage (`model.num_chunks`).

    Attributes:
        split: "tp" for files of tensor-parallel ranks, "wp" for those of weight-parallel ranks (isp).
        num_ranks: number of tensor- or weight-parallel ranks.
        num_stages: number of pipeline stages.
        layer_numbers: by stage: (chunk, number of a layer in the files) -> number in the model, in the files' order.
        buffers: name -> values of tensors that the config determines; equal in all files.

    Raises:
        CheckpointError: a file is missing or damaged, or this kind of checkpoint is not supported.
    """

    def __init__(self, folder: Path, num_chunks: int = 1) -> None:
        self.folder = folder
        self.split, self.num_ranks, self.num_stages = _grid(folder)
        self._shards: dict[str, list[RankShard | None]] = {}
        self.buffers: dict[str, Tensor] = {}
        states = [
            [load_file(folder / self.file(rank, stage), mapped=True) for rank in range(self.num_ranks)]
            for stage in range(self.num_stages)
        ]
        self._by_stage: list[list[str]] = [[] for _ in range(self.num_stages)]
        stages = [self._merge_ranks(stage, by_rank) for stage, by_rank in enumerate(states)]
        self.layer_numbers = _global_layers(stages, num_chunks, folder)
        for stage, numbers in enumerate(self.layer_numbers):
            for (chunk, name), shards in stages[stage].items():
                match = LAYER.fullmatch(name)
                global_name = name if match is None else f"layers.{numbers[chunk, int(match[1])]}.{match[2]}"
                if global_name in self._shards:
                    raise CheckpointError(f"'{folder}': two pipeline stages have the weight '{global_name}'")
                self._shards[global_name] = shards
                self._by_stage[stage].append(global_name)
        self._stage_of = {name: stage for stage, names in enumerate(self._by_stage) for name in names}

    @staticmethod
    def check(folder: Path) -> None:
        """Check the names of the files, without reading them.

        Raises:
            CheckpointError: a file is missing, or this kind of checkpoint is not supported.
        """
        _grid(folder)

    def file(self, rank: int, stage: int) -> str:
        """Name of the weight file of a rank and stage."""
        return f"model_{self.split}{rank}_pp{stage}.pt"

    def names(self) -> set[str]:
        """Names of the weights, with global layer numbers; fused weights are `wqkv` and `w13`."""
        return set(self._shards)

    def shards(self, name: str) -> list[RankShard]:
        """The shards of a weight in rank order; ranks without one are omitted."""
        return [shard for shard in self._shards[name] if shard is not None]

    def agreed(self, name: str, replicas: Sequence[RankShard]) -> Tensor:
        """The tensor of replicas, which must be bit-equal.

        Raises:
            CheckpointError: the replicas differ.
        """
        first = replicas[0]
        for other in replicas[1:]:
            if not same_bits(first.tensor, other.tensor):
                raise CheckpointError(
                    f"'{name}' should be equal on all ranks, but {first.file} and {other.file} differ: the ranks of "
                    "that run had diverged, or a file is damaged"
                )
        return first.tensor

    def weights_of(self, rank: int, stage: int) -> dict[str, Tensor]:
        """The weights in the file of one rank, in file order."""
        shards = {name: self._shards[name][rank] for name in self._by_stage[stage]}
        return {name: shard.tensor for name, shard in shards.items() if shard is not None}

    def ranks_of(self, name: str) -> list[tuple[int, int]]:
        """(rank, stage) of each shard in `shards(name)`."""
        stage = self._stage_of[name]
        return [(rank, stage) for rank, shard in enumerate(self._shards[name]) if shard is not None]

    def _merge_ranks(
        self, stage: int, states: Sequence[Mapping[str, Any]]
    ) -> dict[tuple[int, str], list[RankShard | None]]:
        """(chunk, name within the chunk) -> shard of each rank."""
        merged: dict[tuple[int, str], list[RankShard | None]] = {}
        for rank, state in enumerate(states):
            for key, tensor in weights_in(state, self.folder / self.file(rank, stage)):
                if is_buffer(key[1]):
                    self.buffers[f"{self.file(rank, stage)}: {key[1]}"] = tensor
                    continue
                shards = merged.setdefault(key, [None] * self.num_ranks)
                if shards[rank] is not None:
                    path = self.folder / self.file(rank, stage)
                    raise CheckpointError(f"'{path}' contains '{key[1]}' twice, under an older and a newer name")
                shards[rank] = RankShard(self.file(rank, stage), tensor)
        for (_, name), shards in merged.items():
            without = [self.file(rank, stage) for rank, shard in enumerate(shards) if shard is None]
            if without and not _ONLY_ON_ONE_RANK.fullmatch(name):
                raise CheckpointError(
                    f"'{self.folder}': the weight '{name}' is missing in {', '.join(without)}; other ranks have it"
                )
        return merged


def read_value(path: Path) -> Any:
    """Read a plain value (dict, text, number) that InternEvo saved with torch; its config sections become dicts.

    Raises:
        CheckpointError: the file is damaged, or contains more than plain values.
    """
    return _plain(load_file(path, mapped=False))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are bit-equal, including NaN."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value


def _grid(folder: Path) -> tuple[str, int, int]:
    """Kind of split, number of ranks and number of stages, from the names of the weight files.

    Raises:
        CheckpointError: a file is missing, or this kind of checkpoint is not supported.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = [match for name in names if (match := RANK_FILE.fullmatch(name))]
    sharded = [match[0] for match in found if match["fsdp"]]
    if sharded:
        raise CheckpointError(
            f"'{folder}' was written with FSDP ('{sharded[0]}'), whose shards only the ranks that wrote them can join. "
            "Load it in InternEvo with the same layout, turn FSDP off (parallel.zero1 = dict(fsdp=False)) and save it "
            "again"
        )
    if not found:
        raise CheckpointError(
            f"there is no InternEvo checkpoint in '{folder}': no file model_tp0_pp0.pt or model_wp0_pp0.pt"
            f"{_hint(folder)}"
        )
    splits = sorted({match["split"] for match in found})
    if len(splits) > 1:
        raise CheckpointError(f"'{folder}' has both model_tp*.pt and model_wp*.pt files: two saves in one folder")
    places = {(int(match["rank"]), int(match["stage"])) for match in found}
    num_ranks, num_stages = (1 + max(place[axis] for place in places) for axis in (0, 1))
    missing = [
        f"model_{splits[0]}{rank}_pp{stage}.pt"
        for stage in range(num_stages)
        for rank in range(num_ranks)
        if (rank, stage) not in places
    ]
    if missing:
        raise CheckpointError(
            f"'{folder}' is incomplete: of the files of {num_ranks} rank(s) and {num_stages} stage(s), "
            f"missing: {', '.join(missing)}"
        )
    return splits[0], num_ranks, num_stages


def _hint(folder: Path) -> str:
    """Advice for a folder without weight files."""
    if not folder.is_dir():
        return "; there is no such folder"
    steps = sorted(
        (path for path in folder.iterdir() if path.name.isdigit() and path.is_dir()), key=lambda path: int(path.name)
    )
    with_weights = [path for path in steps if any(RANK_FILE.fullmatch(inner.name) for inner in path.iterdir())]
    if with_weights:
        return f". This is a folder of checkpoints: give one of them, such as '{with_weights[-1]}'"
    if (folder / "model").is_dir() and (folder / "global_optimizer_state.pt").exists():
        return ". This is a universal checkpoint (universal_ckpt): save it in InternEvo without universal_ckpt"
    return ""


class _ParallelMode(str):
    """Placeholder for members of InternEvo's enum of this name, which its optimizer files contain; never read."""


def load_file(path: Path, *, mapped: bool) -> Any:
    """Load a file that InternEvo saved with torch, with tensors and plain values.

    Args:
        path: of the file.
        mapped: memory-map the tensors instead of reading them.

    Raises:
        CheckpointError: the file is missing or damaged, or contains something else.
    """
    # InternEvo's class of config sections is a dict; members of its enum of parallel modes are pickled as text.
    allowed: list[Any] = [
        (OrderedDict, "internlm.core.context.parallel_context.Config"),
        (_ParallelMode, "internlm.core.context.process_group_initializer.ParallelMode"),
        (_ParallelMode, "internlm.core.context.parallel_context.ParallelMode"),
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"'{path}' does not exist") from None
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "unsupported" in line.lower()), "")
        raise CheckpointError(
            f"'{path}' is damaged, or contains more than tensors and plain values; code from a checkpoint is not run"
            + (f": {reason}" if reason else "")
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"'{path}' is damaged or not a file of torch.save: {str(error).splitlines()[0]}"
        ) from error


def weights_in(state: object, path: Path) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """((chunk, uniform name within the chunk), tensor) of one file.

    Raises:
        CheckpointError: the file contains something else.
    """
    if not isinstance(state, dict):
        raise CheckpointError(f"'{path}' contains a {type(state).__name__} instead of a dict of weights")
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"'{path}': '{key}' is a {type(tensor).__name__} instead of a tensor")
        chunk, name = 0, str(key)
        match = re.fullmatch(r"(\d+)\.(.+)", name)
        if match:  # the chunks of an interleaved pipeline are a list of modules
            chunk, name = int(match[1]), match[2]
        for pattern, newer in _OLDER_NAMES:
            name = pattern.sub(newer, name)
        yield (chunk, name), tensor


def _global_layers(
    stages: Sequence[Mapping[tuple[int, str], object]], num_chunks: int, folder: Path
) -> list[dict[tuple[int, int], int]]:
    """For each stage: (chunk in the file, number of the layer there) -> number of the layer in the model."""
    local = [
        sorted({(chunk, int(match[1])) for chunk, name in stage if (match := LAYER.fullmatch(name))})
        for stage in stages
    ]
    numbers = [number for stage in local for _, number in stage]
    num_layers = len(numbers)
    if sorted(numbers) == list(range(num_layers)) and all(chunk == 0 for stage in local for chunk, _ in stage):
        return [{place: place[1] for place in stage} for stage in local]  # one stage, or global numbers already
    sizes = _chunk_sizes(local, num_chunks, folder)
    order = [(chunk, stage) for chunk in range(len(sizes[0])) for stage in range(len(stages))]
    if len(stages) > 1 and {"tok_embeddings.weight", "norm.weight"} <= {name for _, name in stages[0]}:
        # A V-shaped pipeline: second chunks are in reverse order, and the first stage has both ends of the model.
        order = [(chunk, stage if chunk % 2 == 0 else len(stages) - 1 - stage) for chunk, stage in order]
    starts: dict[tuple[int, int], int] = {}
    start = 0
    for chunk, stage in order:
        starts[stage, chunk] = start
        start += sizes[stage][chunk]
    result: list[dict[tuple[int, int], int]] = []
    for stage, places in enumerate(local):
        in_order = [starts[stage, chunk] + layer for chunk, size in enumerate(sizes[stage]) for layer in range(size)]
        result.append(dict(zip(places, in_order, strict=True)))
    return result


def _chunk_sizes(local: Sequence[Sequence[tuple[int, int]]], num_chunks: int, folder: Path) -> list[list[int]]:
    """Layers of each chunk of each stage."""
    counted = [[sum(1 for chunk, _ in stage if chunk == number) for number in range(_chunks(stage))] for stage in local]
    if num_chunks == 1 or max(len(sizes) for sizes in counted) > 1:
        if len({len(sizes) for sizes in counted}) > 1:
            raise CheckpointError(f"'{folder}': the pipeline stages have different numbers of chunks: {counted}")
        return counted
    # Layers are numbered across the chunks of a stage. InternEvo splits the layers into equal chunks and each chunk
    # into stages, and gives the remainder to the last stages.
    num_layers, num_stages = sum(len(stage) for stage in local), len(local)
    per_stage, rest = divmod(num_layers // num_chunks, num_stages)
    sizes = [[per_stage + (stage >= num_stages - rest)] * num_chunks for stage in range(num_stages)]
    if num_layers % num_chunks or [sum(stage) for stage in sizes] != [len(stage) for stage in local]:
        raise CheckpointError(
            f"'{folder}': the stages have {[len(stage) for stage in local]} layers, which is not how {num_layers} "
            f"layers are split into {num_stages} stages of {num_chunks} chunks; check model.num_chunks = {num_chunks}"
        )
    return sizes


def _chunks(stage: Sequence[tuple[int, int]]) -> int:
    return 1 + max((chunk for chunk, _ in stage), default=0)
