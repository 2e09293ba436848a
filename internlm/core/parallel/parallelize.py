"""From a model on the meta device to this rank's part of it, with the same weights under every layout.

This is the only place that gives parameters storage. It knows roles and modes, and nothing of any model family.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel import replicated
from internlm.core.parallel.model_parallel import ModelParallel
from internlm.core.parallel.shard_spec import ShardSpec, attach_shard_spec
from internlm.core.parallel.weight_gradients import WeightGradients
from internlm.model.initialization import initializer_of
from internlm.model.roles import Role


@dataclass(frozen=True)
class ParallelOptions:
    """How the layout's modes go about their work. No option changes a result beyond rounding.

    Attributes:
        split_embedding_hidden: split an untied embedding over its hidden dimension instead of its vocabulary.
        weight_overlap: isp: gather weights ahead of their use, and reduce their gradients behind it.
        gather_ahead: isp: gather the next module's weights, or those of the next layer.
        gather_layer_before: isp, by layer: the point of a layer where the gather of the next one starts.
        release_gradients_early: isp: free a reduced gradient's buffers when the next one is there, not with the step.
        memory_pool: isp: keep gather buffers and use them again.
        reduce_dtype: isp: dtype in which weight gradients travel.
        postpone_weight_gradients: linear layers can leave weight gradients for later, as zero-bubble schedules ask.
    """

    split_embedding_hidden: bool = True
    weight_overlap: bool = False
    gather_ahead: Literal["layer", "module"] = "layer"
    gather_layer_before: Literal["wqkv", "attn", "wo", "w1"] = "wo"
    release_gradients_early: bool = True
    memory_pool: bool = False
    reduce_dtype: torch.dtype = torch.float32
    postpone_weight_gradients: bool = False


def parallelize(
    model: nn.Module,
    context: ParallelContext,
    *,
    seed: int = 1024,
    options: ParallelOptions | None = None,
    shared: dict[str, nn.Parameter] | None = None,
    weight_gradients: WeightGradients | None = None,
) -> nn.Module:
    """Give every parameter of `model` its ShardSpec and its local, initialised tensor. Changes and returns `model`.

    The result carries `parallel`, a `ModelParallel`.

    Args:
        model: built under `torch.device("meta")`; may carry `roles` (see `internlm.model.roles`).
        context: where this rank stands.
        seed: random numbers of a parameter are keyed by this seed and the parameter's global name alone.
        options: see `ParallelOptions`.
        shared: the parameters that other chunks of this rank hold already, by global name; a chunk that has one of them
            too (a tied embedding where the first and the last stage are one rank) gets the same. Added to.
        weight_gradients: the one object for all chunks of a rank; None makes one.

    Raises:
        ValueError: a parameter already has storage, or a buffer is on meta.
    """
    roles = roles_by_module(model)
    placed: dict[nn.Parameter, nn.Parameter] = {}
    shared = {} if shared is None else shared
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # A weight used twice (tied embeddings) is one parameter under its first name.
            if parameter not in placed:
                full_name = f"{module_name}.{name}" if module_name else name
                if full_name not in shared:
                    spec = replicated.shard(full_name, parameter, roles.get(module_name, Role.REPLICATED), context)
                    shared[full_name] = _materialize(parameter, spec, context.device, seed)
                placed[parameter] = shared[full_name]
            setattr(module, name, placed[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                raise ValueError(
                    f"buffer '{module_name}.{name}' is on the meta device: compute it where it is used, or create it "
                    f'under torch.device("cpu")'
                )
    model.parallel = ModelParallel(context, weight_gradients or WeightGradients())  # type: ignore[assignment]
    return model.to(context.device)


def shard_specs(
    model: nn.Module, context: ParallelContext, options: ParallelOptions | None = None
) -> Iterator[tuple[str, ShardSpec, nn.Parameter]]:
    """What a rank would hold of each parameter, by its name in `model`: pure, without storage or process groups.

    Args:
        model: built under `torch.device("meta")`.
        context: where the rank would stand.
        options: see `ParallelOptions`.
    """
    roles = roles_by_module(model)
    for name, parameter in model.named_parameters():
        role = roles.get(name.rpartition(".")[0], Role.REPLICATED)
        yield name, replicated.shard(name, parameter, role, context), parameter


def roles_by_module(model: nn.Module) -> dict[str, Role]:
    """Module name -> role, for every module that a pattern of `model.roles` names; a later pattern wins."""
    patterns: dict[str, Role] = dict(getattr(model, "roles", {}))
    return {
        name: role
        for pattern, role in patterns.items()
        for name, _ in model.named_modules()
        if fnmatchcase(name, pattern)
    }


def _materialize(parameter: nn.Parameter, spec: ShardSpec, device: torch.device, seed: int) -> nn.Parameter:
    if not parameter.is_meta:
        raise ValueError(f'parameter "{spec.name}" already has storage: build the model under torch.device("meta")')
    # One whole tensor at a time, in fp32: a rank's share of the random numbers must not depend on the layout or dtype.
    whole = torch.empty(spec.global_shape, dtype=torch.float32, device=device)
    generator = torch.Generator(device=device).manual_seed(_key(seed, spec.name))
    initializer_of(parameter).fill(whole, generator)
    if spec.is_whole:
        local = whole.to(parameter.dtype)
    else:
        local = torch.zeros(spec.local_shape, dtype=parameter.dtype, device=device)
        for box in spec.boxes:
            local[box.local_slices()] = whole[box.global_slices()].to(parameter.dtype)
    result = nn.Parameter(local, requires_grad=parameter.requires_grad)
    attach_shard_spec(result, spec)
    return result


def _key(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
