"""The optimizer state of an InternEvo checkpoint: fp32 masters and moments, split like the weights in its files.

Sizes in the files are compared with the weights, and every master with the weight rounded from it. So a plan or a file
of another save is always detected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from internlm.convert.internevo_files import InternEvoFiles, RankShard
from internlm.convert.internevo_plan import (
    MisfitError,
    StateRange,
    assign,
    distribute,
    possible_parameters,
    split_evenly,
)
from internlm.convert.internevo_shards import WEIGHTS_ONLY, Plan, count_shards, options_of, read_plans, read_shard
from internlm.utils.errors import CheckpointError


class InternEvoOptimizer:
    """The optimizer state of an InternEvo checkpoint.

    Args:
        files: the weights of the same checkpoint.

    Attributes:
        num_zero: number of ZeRO ranks: files of each tensor- or weight-parallel rank and stage.
        num_updates: AdamW's step.
        scaler: state of the loss scaler, by this package's names.
        options: lr, betas, eps and weight_decay at the time of the save.
        differences: kind and name -> largest difference between replicas. Filled while the state is read; the first
            rank's values are used.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the weights.
    """

    def __init__(self, files: InternEvoFiles) -> None:
        self.differences: dict[str, float] = {}
        self._files = files
        self.num_zero = count_shards(files)
        places = [(rank, stage) for stage in range(files.num_stages) for rank in range(files.num_ranks)]
        self._shards = {
            place: [read_shard(files.folder / self._name(*place, zero)) for zero in range(self.num_zero)]
            for place in places
        }
        self._check_alike()
        plans = read_plans(files)
        self._ranges = {place: self._locate(place, plans.get(place)) for place in places}
        self._verified: set[str] = set()

    def of_kind(self, kind: str) -> _StateShards:
        """Masters ("master") or moments ("exp_avg", "exp_avg_sq"), split and named like the weights in the files."""
        return _StateShards(self, self._files, kind)

    def part(self, kind: str, name: str, rank: int, stage: int, weight: Tensor) -> Tensor:
        """A rank's shard of a master or moment, fp32 with the shape of its weight.

        Raises:
            CheckpointError: the master does not round to the weight.
        """
        tensor = self._gather(kind, name, rank, stage, weight)
        where = f"{name} {rank} {stage}"
        if where not in self._verified:
            master = tensor if kind == "master" else self._gather("master", name, rank, stage, weight)
            rounded = master.to(weight.dtype)
            if not bool(((rounded == weight) | (rounded.isnan() & weight.isnan())).all()):
                raise CheckpointError(
                    f"'{self._files.folder}': the fp32 masters of '{name}' in {self._name(rank, stage)} do not round "
                    f"to the weights in {self._files.file(rank, stage)}: they are from two saves, or the ZeRO plan is "
                    f"from another run{WEIGHTS_ONLY}"
                )
            self._verified.add(where)
        return tensor

    def agreed(self, kind: str, name: str, replicas: Sequence[RankShard]) -> Tensor:
        """The tensor of the first rank; differences of the others are recorded."""
        first = replicas[0].tensor
        for other in replicas[1:]:
            if not torch.equal(first, other.tensor):
                gap = float((first - other.tensor).abs().nan_to_num(nan=math.inf).max())
                key = f"{kind} of {name}"
                self.differences[key] = max(gap, self.differences.get(key, 0.0))
        return first

    # -- reading --------------------------------------------------------------------------------------------------

    def _name(self, rank: int, stage: int, zero: int | None = None) -> str:
        return f"optimizer_{self._files.split}{rank}_pp{stage}_zo{'*' if zero is None else zero}.pt"

    def _check_alike(self) -> None:
        """Check that values that are global in this package are equal in all files."""
        shards = [shard for by_zero in self._shards.values() for shard in by_zero]
        first = shards[0]
        for shard in shards[1:]:
            if (shard.is_split, [g.name for g in shard.groups]) != (first.is_split, [g.name for g in first.groups]):
                raise CheckpointError(
                    f"'{first.path}' and '{shard.path}' have different parameter groups{WEIGHTS_ONLY}"
                )
            if shard.scaler != first.scaler:
                raise CheckpointError(f"'{first.path}' and '{shard.path}' have different loss scales{WEIGHTS_ONLY}")
        steps = set().union(*(shard.steps for shard in shards))
        if len(steps) > 1:
            raise CheckpointError(
                f"'{first.path.parent}': AdamW's step differs between parameters ({sorted(steps)[:5]}), but all "
                f"parameters of this package share one{WEIGHTS_ONLY}"
            )
        if steps and any(not group.tensors["exp_avg"] for shard in shards for group in shard.groups if group.tensors):
            raise CheckpointError(f"'{first.path.parent}': some optimizer files have no moments{WEIGHTS_ONLY}")
        self.num_updates = steps.pop() if steps else 0
        scaler = first.scaler
        self.scaler = {
            "scale": scaler["_scale"],
            "clean_steps": int(scaler["_growth_step"]),
            "overflows": int(scaler["_hysteresis_step"]),
        }
        self.options = options_of(shards)

    def _gather(self, kind: str, name: str, rank: int, stage: int, weight: Tensor) -> Tensor:
        shards = self._shards[rank, stage]
        parts = []
        for part in self._ranges[rank, stage][name]:
            tensors = shards[part.zero].groups[part.group].tensors[kind]
            # Before the first update the files have no moments; they are zero.
            parts.append(
                tensors[part.number].reshape(-1)[part.start : part.stop]
                if tensors
                else torch.zeros(part.stop - part.start)
            )
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        return flat.view(weight.shape)

    # -- mapping elements to weights ------------------------------------------------------------------------------

    def _locate(self, place: tuple[int, int], plan: Plan | None) -> dict[str, list[StateRange]]:
        """The ranges of each weight of a (rank, stage) in its optimizer files."""
        shards = self._shards[place]
        plan = plan or shards[0].plan
        reason: MisfitError | None = None
        for parameters in possible_parameters(self._files.weights_of(*place)):
            try:
                groups = assign(parameters, shards)
                return dict(split_evenly(groups, shards) if shards[0].is_split else distribute(groups, shards, plan))
            except MisfitError as error:
                reason = reason or error
        source = "" if plan or shards[0].is_split else " (no gpus-*.pt file assigns parameters to ranks)"
        raise CheckpointError(
            f"'{self._files.folder}': {self._name(*place)} do not contain the state of the weights in "
            f"{self._files.file(*place)}: {reason}{source}{WEIGHTS_ONLY}"
        )


@dataclass(frozen=True)
class _StateShards:
    """`RankShards` of one kind of state."""

    optimizer: InternEvoOptimizer
    files: InternEvoFiles
    kind: str

    def shards(self, name: str) -> list[RankShard]:
        ranks = zip(self.files.ranks_of(name), self.files.shards(name), strict=True)
        return [
            RankShard(shard.file, self.optimizer.part(self.kind, name, *place, shard.tensor)) for place, shard in ranks
        ]

    def agreed(self, name: str, replicas: Sequence[RankShard]) -> Tensor:
        return self.optimizer.agreed(self.kind, name, replicas)
