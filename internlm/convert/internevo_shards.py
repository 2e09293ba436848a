"""The optimizer files of an InternEvo checkpoint: groups, masters, moments, and the plan of ZeRO's parts.

Knows the files and nothing of weights; which elements belong to which weight is said in `internevo_plan`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm.convert.internevo_files import InternEvoFiles, load_file, read_value
from internlm.utils.errors import CheckpointError

KINDS = ("master", "exp_avg", "exp_avg_sq")

WITHOUT_IT = "; --weights-only imports the weights without the optimizer"
"""What a user can do about files that cannot be read."""

Plan = list[list[list[str]]]
"""For each group, for each ZeRO rank: its parameters as `<number by size>_<dimensions>`."""

SHARD_FILE = re.compile(r"optimizer_(?P<split>tp|wp)(?P<rank>\d+)_pp(?P<stage>\d+)_zo(?P<zero>\d+)\.pt")
PLAN_FILE = re.compile(r"gpus-\d+((?:_[a-z]+-\d+)+)\.pt")


def has_optimizer(folder: Path) -> bool:
    """Whether the folder holds optimizer files of any kind."""
    return any(path.name.startswith("optimizer_") for path in folder.iterdir())


@dataclass(frozen=True)
class Group:
    """A parameter group in one file. Lists hold one flat tensor, or one tensor a parameter with split tensors."""

    name: str
    options: dict[str, Any]
    tensors: dict[str, list[Tensor]]
    """By kind; the moments are empty before the first update."""


@dataclass(frozen=True)
class Shard:
    """One file."""

    path: Path
    is_split: bool
    groups: list[Group]
    scaler: dict[str, float]
    plan: Plan | None
    steps: set[int]


def count_shards(files: InternEvoFiles) -> int:
    """ZeRO ranks, all of whose files are there."""
    names = sorted(path.name for path in files.folder.iterdir() if path.name.startswith("optimizer_"))
    found = [match for name in names if (match := SHARD_FILE.fullmatch(name)) and match["split"] == files.split]
    others = sorted(set(names) - {match[0] for match in found})
    if others:
        raise CheckpointError(
            f"'{files.folder / others[0]}' is not of a {files.split} rank's optimizer, as the weights are{WITHOUT_IT}"
        )
    num_zero = 1 + max(int(match["zero"]) for match in found)
    wanted = {
        f"optimizer_{files.split}{rank}_pp{stage}_zo{zero}.pt"
        for stage in range(files.num_stages)
        for rank in range(files.num_ranks)
        for zero in range(num_zero)
    }
    missing, extra = sorted(wanted - set(names)), sorted(set(names) - wanted)
    if missing:
        raise CheckpointError(
            f"'{files.folder}' is incomplete: of the optimizer files of {files.num_ranks} rank(s), {files.num_stages} "
            f"stage(s) and {num_zero} ZeRO rank(s), {', '.join(missing[:4])} is missing{WITHOUT_IT}"
        )
    if extra:
        raise CheckpointError(
            f"'{files.folder / extra[0]}' belongs to a rank of which there are no weights{WITHOUT_IT}"
        )
    return num_zero


def read_shard(path: Path) -> Shard:
    """Read one rank's optimizer file."""
    state = load_file(path, mapped=True)
    try:
        is_split = "master_current_weights" in state
        masters = state["master_current_weights" if is_split else "flat_fp32_weights"]
        base, scaler, plan = state["base_optim_states"], state["grad_scaler"], state.get("zero_devide_optim_plan")
        steps: set[int] = set()
        groups = []
        for number, options in enumerate(base["param_groups"]):
            flat = masters.get(number, [])
            own: list[Tensor] = [tensor.detach() for tensor in (flat if is_split or number not in masters else [flat])]
            states = [base["state"].get(index, {}) for index in options["params"][: len(own)]]
            steps |= {int(one.get("step", options.get("step", 0))) for one in states if one}
            moments = {kind: [one[kind] for one in states if one] for kind in KINDS[1:]}
            unknown = sorted(set().union(*states) - {"step", *KINDS[1:]})
            if unknown:
                raise CheckpointError(f"'{path}': its AdamW also kept {', '.join(unknown)}, which this one has not")
            tensors: dict[str, list[Tensor]] = {"master": own, **moments} if own else {}
            groups.append(Group(str(options.get("name", "default")), options, tensors))
        keys = ("_scale", "_growth_step", "_hysteresis_step")
        shard = Shard(path, is_split, groups, {key: float(scaler[key]) for key in keys}, plan, steps)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"'{path}' is no optimizer file of InternEvo: {type(error).__name__}: {error}{WITHOUT_IT}"
        ) from error
    for group in shard.groups:
        for kind, found in group.tensors.items():
            sizes = [tensor.numel() for tensor in found]
            if any(tensor.dtype != torch.float32 for tensor in found):
                raise CheckpointError(f"'{path}': {kind} of group '{group.name}' is not in fp32{WITHOUT_IT}")
            if sizes and sizes != [master.numel() for master in group.tensors["master"]]:
                raise CheckpointError(
                    f"'{path}': {kind} of group '{group.name}' has another size than its masters{WITHOUT_IT}"
                )
    return shard


def options_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """lr, betas, eps and weight_decay, which all groups of all files share; empty when there is no group.

    Raises:
        CheckpointError: they differ.
    """
    first: dict[str, Any] = {}
    for shard in shards:
        for group in (group for group in shard.groups if group.tensors):
            options = {name: group.options[name] for name in ("lr", "betas", "eps", "weight_decay")}
            # A list in files of older versions of PyTorch.
            options["betas"] = tuple(options["betas"])
            first = first or options
            if options != first:
                raise CheckpointError(
                    f"'{shard.path}': {options} of group '{group.name}' is not that of the others, {first}{WITHOUT_IT}"
                )
    return first


def read_plans(files: InternEvoFiles) -> dict[tuple[int, int], Plan]:
    """(rank, stage) -> the plan in the `gpus-*.pt` files; every GPU wrote one, and those of a rank are the same."""
    plans: dict[tuple[int, int], tuple[Path, Plan]] = {}
    for path in sorted(files.folder.glob("gpus-*.pt")):
        match = PLAN_FILE.fullmatch(path.name)
        axes = dict(re.findall(r"_([a-z]+)-(\d+)", match[1])) if match else {}
        if files.split not in axes or "pp" not in axes:
            continue
        place, plan = (int(axes[files.split]), int(axes["pp"])), read_value(path)
        other, expected = plans.setdefault(place, (path, plan))
        if plan != expected:
            raise CheckpointError(
                f"'{other}' and '{path.name}' disagree on which ZeRO rank has which parameter: they are of two runs"
                f"{WITHOUT_IT}"
            )
    return {place: plan for place, (_, plan) in plans.items()}
