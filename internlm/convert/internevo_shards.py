"""The optimizer files of an InternEvo checkpoint: groups, masters, moments, and the plan of ZeRO's assignment.

Knows the files but no weights; `internevo_plan` maps elements to weights.
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

WEIGHTS_ONLY = "; --weights-only imports the weights without the optimizer"
"""Advice for files that cannot be imported."""

Plan = list[list[list[str]]]
"""By parameter group and ZeRO rank: its parameters as `<number by size>_<dimensions>`."""

SHARD_FILE = re.compile(r"optimizer_(?P<split>tp|wp)(?P<rank>\d+)_pp(?P<stage>\d+)_zo(?P<zero>\d+)\.pt")
PLAN_FILE = re.compile(r"gpus-\d+((?:_[a-z]+-\d+)+)\.pt")


def has_optimizer(folder: Path) -> bool:
    """Whether the folder contains optimizer files of any kind."""
    return any(path.name.startswith("optimizer_") for path in folder.iterdir())


@dataclass(frozen=True)
class Group:
    """A parameter group in one file.

    Attributes:
        name: of the group.
        options: of the optimizer, such as lr and betas.
        tensors: kind -> one flat tensor, or one tensor per parameter if tensors are split; moments are empty before
            the first update.
    """

    name: str
    options: dict[str, Any]
    tensors: dict[str, list[Tensor]]


@dataclass(frozen=True)
class Shard:
    """Content of one optimizer file.

    Attributes:
        path: of the file.
        is_split: whether `use_split_tensor_optim` split every parameter over the ZeRO ranks.
        groups: parameter groups.
        scaler: state of the loss scaler.
        plan: assignment of parameters to ZeRO ranks, if the file has it.
        steps: AdamW's step counts.
    """

    path: Path
    is_split: bool
    groups: list[Group]
    scaler: dict[str, float]
    plan: Plan | None
    steps: set[int]


def count_shards(files: InternEvoFiles) -> int:
    """Count the ZeRO ranks.

    Raises:
        CheckpointError: an optimizer file is missing, or belongs to other weights.
    """
    names = sorted(path.name for path in files.folder.iterdir() if path.name.startswith("optimizer_"))
    found = [match for name in names if (match := SHARD_FILE.fullmatch(name)) and match["split"] == files.split]
    others = sorted(set(names) - {match[0] for match in found})
    if others:
        raise CheckpointError(
            f"'{files.folder / others[0]}' is not the optimizer file of a {files.split} rank, unlike the weights"
            f"{WEIGHTS_ONLY}"
        )
    num_zero = 1 + max(int(match["zero"]) for match in found)
    expected = {
        f"optimizer_{files.split}{rank}_pp{stage}_zo{zero}.pt"
        for stage in range(files.num_stages)
        for rank in range(files.num_ranks)
        for zero in range(num_zero)
    }
    missing, extra = sorted(expected - set(names)), sorted(set(names) - expected)
    if missing:
        raise CheckpointError(
            f"'{files.folder}' is incomplete: of the optimizer files of {files.num_ranks} rank(s), {files.num_stages} "
            f"stage(s) and {num_zero} ZeRO rank(s), missing: {', '.join(missing[:4])}{WEIGHTS_ONLY}"
        )
    if extra:
        raise CheckpointError(f"'{files.folder / extra[0]}' belongs to a rank without weights{WEIGHTS_ONLY}")
    return num_zero


def read_shard(path: Path) -> Shard:
    """Read one rank's optimizer file.

    Raises:
        CheckpointError: the file is damaged, or not an AdamW state in fp32.
    """
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
                raise CheckpointError(f"'{path}': its AdamW has the state {', '.join(unknown)}, which ours lacks")
            tensors: dict[str, list[Tensor]] = {"master": own, **moments} if own else {}
            groups.append(Group(str(options.get("name", "default")), options, tensors))
        keys = ("_scale", "_growth_step", "_hysteresis_step")
        shard = Shard(path, is_split, groups, {key: float(scaler[key]) for key in keys}, plan, steps)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"'{path}' is not an optimizer file of InternEvo: {type(error).__name__}: {error}{WEIGHTS_ONLY}"
        ) from error
    for group in shard.groups:
        for kind, found in group.tensors.items():
            sizes = [tensor.numel() for tensor in found]
            if any(tensor.dtype != torch.float32 for tensor in found):
                raise CheckpointError(f"'{path}': {kind} of group '{group.name}' is not in fp32{WEIGHTS_ONLY}")
            if sizes and sizes != [master.numel() for master in group.tensors["master"]]:
                raise CheckpointError(
                    f"'{path}': {kind} of group '{group.name}' has another size than its masters{WEIGHTS_ONLY}"
                )
    return shard


def options_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """lr, betas, eps and weight_decay, which all groups of all files must share; empty if there is no group.

    Raises:
        CheckpointError: the groups differ.
    """
    first: dict[str, Any] = {}
    for shard in shards:
        for group in (group for group in shard.groups if group.tensors):
            options = {name: group.options[name] for name in ("lr", "betas", "eps", "weight_decay")}
            # Older versions of PyTorch saved a list.
            options["betas"] = tuple(options["betas"])
            first = first or options
            if options != first:
                raise CheckpointError(
                    f"'{shard.path}': group '{group.name}' has {options}, other groups have {first}{WEIGHTS_ONLY}"
                )
    return first


def read_plans(files: InternEvoFiles) -> dict[tuple[int, int], Plan]:
    """(rank, stage) -> plan in the `gpus-*.pt` files. Every GPU wrote one; those of the same rank must be equal."""
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
                f"'{other}' and '{path.name}' assign parameters to different ZeRO ranks: they are from two runs"
                f"{WEIGHTS_ONLY}"
            )
    return {place: plan for place, (_, plan) in plans.items()}
