"""Maps the elements of an InternEvo checkpoint's optimizer files to weights.

- The hybrid ZeRO optimizer assigns whole parameters to ZeRO ranks. For each parameter group a file has one flat tensor
  that concatenates the rank's parameters, the largest first. The plan in `gpus-*.pt` contains the assignment. Without
  it, the assignment is recomputed as InternEvo does without `overlap_sync_param`: each parameter goes to the rank with
  the fewest elements so far.
- `use_split_tensor_optim` pads each parameter and splits it into equal parts, one per ZeRO rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from internlm.convert.internevo_shards import Plan, Shard

_UNFUSED = ("wq", "wk", "wv", "w1", "w3")
_PART_OF_FUSED = re.compile(r"(layers\.\d+\.(?:attention|feed_forward))\.(wq|wk|wv|w1|w3)\.(weight|bias)")
_AFTER_FUSED = re.compile(r"(layers\.\d+\.(?:attention|feed_forward))\.(?:wo|w2)\.(?:weight|bias)")


class MisfitError(Exception):
    """The files do not contain the state of these parameters."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of the optimizer: one weight of the files, or several that were rows of a fused weight."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def parts(self) -> Iterator[tuple[str, int, int]]:
        """(name, start, stop) of each weight's elements in the flat parameter."""
        start = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            stop = start + math.prod(shape)
            yield name, start, stop
            start = stop


@dataclass(frozen=True)
class StateRange:
    """Elements of a weight: [start, stop) of tensor `number` of a group in the file of ZeRO rank `zero`."""

    zero: int
    group: int
    number: int
    start: int
    stop: int


def possible_parameters(weights: dict[str, Tensor]) -> Iterator[list[Parameter]]:
    """The sets of parameters that a rank may have had: the weights of the files, or with some of them fused.

    InternEvo unfuses `wqkv` and `fused_w1_w3` when it saves weights, but the optimizer state stays fused.
    """
    yield [_parameter(weights, [name]) for name in weights]
    for fused in (("w1", "w3"), ("wq", "wk", "wv"), _UNFUSED):
        groups: dict[tuple[str, str], list[str]] = {}
        for name in weights:
            match = _PART_OF_FUSED.fullmatch(name)
            if match and match[2] in fused:
                groups.setdefault((match[1], match[3]), []).append(name)
        if groups:
            yield _fused(weights, [sorted(names, key=_row_order) for names in groups.values()])


def _row_order(name: str) -> int:
    return _UNFUSED.index(name.split(".")[-2])


def _fused(weights: dict[str, Tensor], groups: Sequence[list[str]]) -> list[Parameter]:
    """Parameters in module order, in which a fused weight comes before `wo` or `w2`."""
    in_groups = {name for names in groups for name in names}
    pending: dict[str, list[list[str]]] = {}
    for names in groups:
        pending.setdefault(names[0].rsplit(".", 2)[0], []).append(names)
    result: list[Parameter] = []
    for name in weights:
        match = _AFTER_FUSED.fullmatch(name)
        if match:
            result += [_parameter(weights, names) for names in pending.pop(match[1], [])]
        if name not in in_groups:
            result.append(_parameter(weights, [name]))
    return result


def _parameter(weights: dict[str, Tensor], names: Sequence[str]) -> Parameter:
    tensors = [weights[name] for name in names]
    return Parameter(tuple(names), tuple(tuple(tensor.shape) for tensor in tensors), tensors[0].dtype)


def assign(parameters: Sequence[Parameter], shards: Sequence[Shard]) -> list[list[Parameter]]:
    """Assign parameters to parameter groups, in model order.

    Raises:
        MisfitError: the groups in the files do not fit the parameters.
    """
    names = [group.name for group in shards[0].groups]
    groups: list[list[Parameter]] = [[] for _ in names]
    in_use = {number for shard in shards for number, group in enumerate(shard.groups) if group.tensors}
    single = all(parameter.dtype == torch.float32 for parameter in parameters) and "fp32" in names
    # A model entirely in fp32 is in the first group, or in group "fp32" of older versions.
    if len(names) == 1 or single:
        groups[0 if 0 in in_use or len(names) == 1 else names.index("fp32")] = list(parameters)
        return groups
    for parameter in parameters:
        name = "default"
        if "embed_head" in names and parameter.names[0] in ("tok_embeddings.weight", "output.weight"):
            name = "embed_head"
        elif parameter.dtype == torch.float32 and "fp32" in names:
            name = "fp32"
        if name not in names:
            raise MisfitError(f"no parameter group '{name}' among {', '.join(names)}")
        groups[names.index(name)].append(parameter)
    for number in sorted(in_use):
        if not groups[number]:
            raise MisfitError(f"no weight belongs to the parameter group '{names[number]}'")
    return groups


def split_evenly(
    groups: Sequence[Sequence[Parameter]], shards: Sequence[Shard]
) -> Iterator[tuple[str, list[StateRange]]]:
    """(name, ranges) of weights whose parameters are padded and split into equal parts, one per ZeRO rank.

    Raises:
        MisfitError: the sizes in the files differ.
    """
    for group, parameters in enumerate(groups):
        for shard in shards:
            found = [tensor.numel() for tensor in shard.groups[group].tensors.get("master", [])]
            expected = [-(-parameter.size // len(shards)) for parameter in parameters]
            if found != expected:
                raise MisfitError(
                    f"group '{shard.groups[group].name}' in {shard.path.name} has {len(found)} parts with "
                    f"{sum(found):,} elements, the weights give {len(expected)} with {sum(expected):,}"
                )
        for number, parameter in enumerate(parameters):
            size = -(-parameter.size // len(shards))
            for name, start, stop in parameter.parts():
                yield (
                    name,
                    [
                        StateRange(zero, group, number, max(start - zero * size, 0), min(stop - zero * size, size))
                        for zero in range(len(shards))
                        if start < (zero + 1) * size and stop > zero * size
                    ],
                )


def distribute(
    groups: Sequence[Sequence[Parameter]], shards: Sequence[Shard], plan: Plan | None
) -> Iterator[tuple[str, list[StateRange]]]:
    """(name, ranges) of weights whose parameters are each on one ZeRO rank, consecutive in its flat tensor.

    Raises:
        MisfitError: the plan does not fit the parameters, or the sizes in the files differ.
    """
    if plan is not None and len(plan) != len(groups):
        raise MisfitError(f"the plan has {len(plan)} parameter groups, the files have {len(groups)}")
    for group, parameters in enumerate(groups):
        by_size = sorted(parameters, key=lambda parameter: -parameter.size)
        by_rank = _greedy(by_size, len(shards)) if plan is None else _planned(by_size, plan[group], len(shards))
        for zero, (own, shard) in enumerate(zip(by_rank, shards, strict=True)):
            flat = shard.groups[group].tensors.get("master", [])
            found, expected = sum(one.numel() for one in flat), sum(parameter.size for parameter in own)
            if found != expected:
                raise MisfitError(
                    f"group '{shard.groups[group].name}' in {shard.path.name} has {found:,} elements, its parameters "
                    f"have {expected:,}"
                )
            offset = 0
            for parameter in own:
                for name, start, stop in parameter.parts():
                    yield name, [StateRange(zero, group, 0, offset + start, offset + stop)]
                offset += parameter.size


def _greedy(by_size: Sequence[Parameter], num_zero: int) -> list[list[Parameter]]:
    result: list[list[Parameter]] = [[] for _ in range(num_zero)]
    sizes = [0] * num_zero
    for parameter in by_size:
        zero = sizes.index(min(sizes))
        result[zero].append(parameter)
        sizes[zero] += parameter.size
    return result


def _planned(by_size: Sequence[Parameter], plan: list[list[str]], num_zero: int) -> list[list[Parameter]]:
    if len(plan) != num_zero:
        raise MisfitError(f"the plan is for {len(plan)} ZeRO ranks, the files are of {num_zero}")
    numbers = [int(entry.split("_")[0]) for entries in plan for entry in entries]
    if sorted(numbers) != list(range(len(by_size))):
        raise MisfitError(f"the plan has {len(numbers)} parameters, the weights give {len(by_size)}")
    result = []
    for entries in plan:
        result.append([by_size[int(entry.split("_")[0])] for entry in entries])
        for entry, parameter in zip(entries, result[-1], strict=True):
            shape = tuple(int(size) for size in entry.split("_")[1:])
            if shape != parameter.shape:
                raise MisfitError(
                    f"the plan has shape {list(shape)} for '{parameter.names[0]}' of shape {list(parameter.shape)}"
                )
    return result
