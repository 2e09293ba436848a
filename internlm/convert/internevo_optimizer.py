"""The optimizer's state in an InternEvo checkpoint: fp32 masters and moments, cut as the weights in its files are.

Sizes in the files are compared with the weights, and every master with the weight that was made from it: neither a plan
nor a file of another save can pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from internlm.convert.internevo_files import InternEvoFiles, RankShard
from internlm.convert.internevo_plan import MisfitError, StateRange, assign, deal_out, forms, split_evenly
from internlm.convert.internevo_shards import WITHOUT_IT, Plan, count_shards, options_of, read_plans, read_shard
from internlm.utils.errors import CheckpointError


class InternEvoOptimizer:
    """The optimizer's state of an InternEvo checkpoint.

    Args:
        files: the weights of the same checkpoint.

    Attributes:
        num_zero: files of a tensor or weight parallel rank of a stage.
        num_updates: AdamW's step.
        scaler: state of the loss scale, by this package's names.
        options: lr, betas, eps and weight_decay as they stood when it was saved.
        differences: name and kind -> largest difference, of state that all ranks should have alike and do not. Filled
            while it is read; the first rank's is taken.

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
        self._segments = {place: self._place(place, plans.get(place)) for place in places}
        self._verified: set[str] = set()

    def of_kind(self, kind: str) -> _StateShards:
        """Masters ("master") or moments ("exp_avg", "exp_avg_sq"), cut and named as the weights in the files."""
        return _StateShards(self, self._files, kind)

    def part(self, kind: str, name: str, rank: int, stage: int, weight: Tensor) -> Tensor:
        """A rank's part of a master or moment, in the shape of its weight, fp32.

        Raises:
            CheckpointError: the master is not that of the weight.
        """
        tensor = self._gather(kind, name, rank, stage, weight)
        where = f"{name} {rank} {stage}"
        if where not in self._verified:
            master = tensor if kind == "master" else self._gather("master", name, rank, stage, weight)
            rounded = master.to(weight.dtype)
            if not bool(((rounded == weight) | (rounded.isnan() & weight.isnan())).all()):
                raise CheckpointError(
                    f"'{self._files.folder}': the fp32 masters of '{name}' in {self._name(rank, stage)} do not round "
                    f"to the weights in {self._files.file(rank, stage)}: they are of two saves, or the ZeRO plan is "
                    f"that of another run{WITHOUT_IT}"
                )
            self._verified.add(where)
        return tensor

    def agreed(self, kind: str, name: str, replicas: Sequence[RankShard]) -> Tensor:
        """The tensor of the first rank; differences are recorded."""
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
        """Check that values that are global here are equal in all files."""
        shards = [shard for by_zero in self._shards.values() for shard in by_zero]
        first = shards[0]
        for shard in shards[1:]:
            if (shard.is_split, [g.name for g in shard.groups]) != (first.is_split, [g.name for g in first.groups]):
                raise CheckpointError(f"'{first.path}' and '{shard.path}' have different parameter groups{WITHOUT_IT}")
            if shard.scaler != first.scaler:
                raise CheckpointError(f"'{first.path}' and '{shard.path}' have different loss scales{WITHOUT_IT}")
        steps = set().union(*(shard.steps for shard in shards))
        if len(steps) > 1:
            raise CheckpointError(
                f"'{first.path.parent}': AdamW has taken different numbers of steps ({sorted(steps)[:5]}), and here "
                f"all parameters share one{WITHOUT_IT}"
            )
        if steps and any(not group.tensors["exp_avg"] for shard in shards for group in shard.groups if group.tensors):
            raise CheckpointError(f"'{first.path.parent}': some optimizer files have no moments{WITHOUT_IT}")
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
        for segment in self._segments[rank, stage][name]:
            tensors = shards[segment.zero].groups[segment.group].tensors[kind]
            # Before the first update there are no moments: they are zero.
            parts.append(
                tensors[segment.number].reshape(-1)[segment.start : segment.stop]
                if tensors
                else torch.zeros(segment.stop - segment.start)
            )
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        return flat.view(weight.shape)

    # -- which elements are whose ---------------------------------------------------------------------------------

    def _place(self, place: tuple[int, int], plan: Plan | None) -> dict[str, list[StateRange]]:
        """Locations of each weight of a rank in its files."""
        shards = self._shards[place]
        plan = plan or shards[0].plan
        reason: MisfitError | None = None
        for parameters in forms(self._files.weights_of(*place)):
            try:
                groups = assign(parameters, shards)
                return dict(split_evenly(groups, shards) if shards[0].is_split else deal_out(groups, shards, plan))
            except MisfitError as error:
                reason = reason or error
        source = "" if plan or shards[0].is_split else " (there is no gpus-*.pt that says which rank has which)"
        raise CheckpointError(
            f"'{self._files.folder}': {self._name(*place)} do not hold the state of the weights in "
            f"{self._files.file(*place)}: {reason}{source}{WITHOUT_IT}"
        )


@dataclass(frozen=True)
class _StateShards:
    """`RankShards` of one kind."""

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
