"""Writes the optimizer's state of a run as InternEvo would have saved it. Knows nothing of the code that reads it.

For each rank of each stage: cut masters and moments as the weights, put them into groups, give each ZeRO rank its
share, and save what an AdamW over these tensors says of itself.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.internevo_format import Checkpoint, Split, rank_tensors, split_layers


@dataclass
class State:
    """Masters and moments of the whole model, by this package's names, and the numbers beside them."""

    master: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    step: int = 40
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    scaler: dict[str, float] = field(
        default_factory=lambda: {"_scale": 4096.0, "_growth_step": 17, "_hysteresis_step": 1}
    )


@dataclass
class Zero:
    """How the optimizer ran."""

    size: int = 1
    replicas: int = 1
    """Data ranks for each ZeRO rank: each writes a plan, the first ones the state."""
    split_tensors: bool = False
    """`use_split_tensor_optim`."""
    by_block: bool = False
    """`overlap_sync_param`: parameters go to ranks in the order of the model, not the largest first."""
    plan: str = "new"
    """Names of the plan's files: "new", "old" (of versions without isp), "inside" the optimizer files, or "none"."""
    fp32_apart: bool = False
    """A model in fp32 as a whole is in the group fp32, as in older versions."""
    one_group: bool = False
    """Versions before there were groups."""
    embed_head: bool = False
    """isp of some versions: embedding and head are a group."""
    fused_gate_up: bool = False
    fused_qkv: bool = False
    """The optimizer holds one weight where the files have its rows under the names of several."""
    apex: bool = False
    """apex' FusedAdam counts its steps in the group."""


@dataclass
class Parameter:
    """A parameter of one rank: a tensor of each kind."""

    name: str
    tensors: dict[str, Tensor]
    dtype: torch.dtype


KINDS = ("master", "exp_avg", "exp_avg_sq")


def write_optimizer(folder: Path, model: Any, checkpoint: Checkpoint, split: Split, zero: Zero, state: State) -> None:
    """Put the optimizer's files beside those of the weights."""
    for path in [*folder.glob("optimizer_*.pt"), *folder.glob("gpus-*.pt")]:
        path.unlink()
    layers = split_layers(checkpoint.section["num_layers"], split)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    kind = "wp" if split.wp else "tp"
    for stage in range(split.pp):
        for rank in range(split.ranks):

            def cut(tensors: dict[str, Tensor], stage: int = stage, rank: int = rank) -> dict[str, Tensor]:
                return rank_tensors(tensors, model, checkpoint.model_type, split, layers, stage, rank)

            marks = cut({name: torch.zeros_like(state.master[name], dtype=dtype) for name, dtype in dtypes.items()})
            parts = {one: cut(getattr(state, one)) for one in KINDS}
            parameters = [
                Parameter(name, {one: parts[one][name] for one in KINDS}, mark.dtype) for name, mark in marks.items()
            ]
            parameters = fuse(parameters, zero)
            groups = into_groups(parameters, zero)
            plan, shards = share_out(groups, zero)
            for number, shard in enumerate(shards):
                saved = {
                    "grad_scaler": dict(state.scaler),
                    "base_optim_states": adamw_state(groups, shard, state, zero),
                    ("master_current_weights" if zero.split_tensors else "flat_fp32_weights"): {
                        group: [one["master"] for one in tensors] if zero.split_tensors else tensors[0]["master"]
                        for group, tensors in enumerate(shard)
                        if tensors or zero.split_tensors
                    },
                }
                if zero.plan == "inside":
                    saved["zero_devide_optim_plan"] = plan
                with parallel_modes():
                    torch.save(saved, folder / f"optimizer_{kind}{rank}_pp{stage}_zo{number}.pt")
            if not zero.split_tensors and zero.plan in ("new", "old"):
                write_plans(folder, plan, zero, split, rank, stage)


def fuse(parameters: list[Parameter], zero: Zero) -> list[Parameter]:
    """The parameters before a hook of InternEvo gave their rows names of their own."""
    triples = [("w1", "w3")] if zero.fused_gate_up else []
    triples += [("wq", "wk", "wv")] if zero.fused_qkv else []
    for names in triples:
        result: list[Parameter] = []
        by_name = {one.name: one for one in parameters}
        for one in parameters:
            linear = one.name.split(".")[-2]
            if linear not in names:
                result.append(one)
            elif linear == names[0]:
                rows = [by_name[one.name.replace(f".{linear}.", f".{name}.")] for name in names]
                tensors = {kind: torch.cat([row.tensors[kind] for row in rows]) for kind in KINDS}
                result.append(Parameter(one.name.replace(f".{linear}.", ".fused."), tensors, one.dtype))
        parameters = result
    return parameters


def into_groups(parameters: Sequence[Parameter], zero: Zero) -> list[tuple[str, list[Parameter]]]:
    if zero.one_group:
        return [("default", list(parameters))]
    half = [one for one in parameters if one.dtype != torch.float32]
    full = [one for one in parameters if one.dtype == torch.float32]
    if not half and not zero.fp32_apart:
        half, full = full, half
    ends = [one for one in half if zero.embed_head and one.name.split(".")[-2] in ("tok_embeddings", "output")]
    groups = [("default", [one for one in half if one not in ends])]
    groups += [("embed_head", ends)] if zero.embed_head else []
    return [*groups, ("fp32", full)]


Tensors = dict[str, Tensor]
Shard = list[list[Tensors]]
"""For each group: one dict of flat tensors, none, or with split tensors one for each parameter."""


def share_out(groups: Sequence[tuple[str, list[Parameter]]], zero: Zero) -> tuple[list[list[list[str]]], list[Shard]]:
    """The plan, and what each ZeRO rank has."""
    shards: list[Shard] = [[] for _ in range(zero.size)]
    plan: list[list[list[str]]] = []
    for _, parameters in groups:
        if zero.split_tensors:
            for number, shard in enumerate(shards):
                shard.append(
                    [{kind: slice_of(one.tensors[kind], number, zero.size) for kind in KINDS} for one in parameters]
                )
            continue
        order = sorted(parameters, key=lambda one: one.tensors["master"].numel(), reverse=True)
        owners = owners_of(order, parameters, zero)
        plan.append([])
        for number, shard in enumerate(shards):
            own = [
                (place, one) for place, (one, owner) in enumerate(zip(order, owners, strict=True)) if owner == number
            ]
            plan[-1].append(["_".join(map(str, (place, *one.tensors["master"].shape))) for place, one in own])
            flat = {kind: torch.cat([one.tensors[kind].flatten() for _, one in own]) for kind in KINDS} if own else None
            shard.append([flat] if flat else [])
    return plan, shards


def slice_of(tensor: Tensor, number: int, count: int) -> Tensor:
    """An equal part of a tensor, padded with zeros."""
    padded = torch.nn.functional.pad(tensor.flatten(), (0, -tensor.numel() % count))
    return padded.chunk(count)[number].clone()


def owners_of(order: Sequence[Parameter], in_model: Sequence[Parameter], zero: Zero) -> list[int]:
    if zero.by_block:
        place = {id(one): number for number, one in enumerate(in_model)}
        return [place[id(one)] * zero.size // len(in_model) for one in order]
    sizes, owners = [0] * zero.size, []
    for one in order:
        owners.append(min(range(zero.size), key=lambda rank: sizes[rank]))
        sizes[owners[-1]] += one.tensors["master"].numel()
    return owners


def adamw_state(
    groups: Sequence[tuple[str, list[Parameter]]], shard: Shard, state: State, zero: Zero
) -> dict[str, Any]:
    """What torch.optim.AdamW says of itself; a group that a rank has no share of keeps the model's parameters."""
    given: list[dict[str, Any]] = []
    for (name, parameters), tensors in zip(groups, shard, strict=True):
        own = [one["master"].clone().requires_grad_() for one in tensors]
        rest = (
            []
            if zero.split_tensors
            else [torch.zeros(one.tensors["master"].shape, dtype=one.dtype) for one in parameters]
        )
        with_mode = {"optimizer_mode": ParallelMode.ZERO1, "dtype": parameters[0].dtype if parameters else None}
        given.append({"params": own or rest, "name": name, **({} if zero.one_group else with_mode)})
    adamw = torch.optim.AdamW(given, state.lr, state.betas, state.eps, state.weight_decay)
    for group, tensors in zip(adamw.param_groups, shard, strict=True):
        for parameter, one in zip(group["params"], tensors, strict=False):
            adamw.state[parameter] = {"exp_avg": one["exp_avg"], "exp_avg_sq": one["exp_avg_sq"]}
            if not zero.apex:
                adamw.state[parameter]["step"] = torch.tensor(float(state.step))
        if zero.apex:
            group["step"] = state.step
        group["betas"] = state.betas
    return adamw.state_dict()


def write_plans(folder: Path, plan: list[list[list[str]]], zero: Zero, split: Split, rank: int, stage: int) -> None:
    data_size = zero.size * zero.replicas
    num_gpus = split.ranks * split.pp * data_size
    for data in range(data_size):
        if zero.plan == "old":
            name = f"gpus-{num_gpus}_pp-{stage}_tp-{rank}_zo-{data % zero.size}.pt"
        else:
            weight = rank if split.wp else 0
            name = f"gpus-{num_gpus}_wp-{weight}_tp-{rank}_dp-{data}_pp-{stage}_zo-{data % zero.size}.pt"
        torch.save(plan, folder / name)


class ParallelMode(Enum):
    """InternEvo's enum; pickled at the place where it lies there."""

    ZERO1 = "zero1"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As Python 3.10 does, which InternEvo runs on.
        return ParallelMode, (self.value,)


ParallelMode.__module__ = "internlm.core.context.process_group_initializer"
ParallelMode.__qualname__ = "ParallelMode"


@contextmanager
def parallel_modes() -> Iterator[None]:
    """The module of the enum exists while something is pickled."""
    module = types.ModuleType(ParallelMode.__module__)
    module.ParallelMode = ParallelMode  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        del sys.modules[module.__name__]
