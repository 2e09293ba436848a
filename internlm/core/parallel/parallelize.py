"""Turns a model on the meta device into this rank's part of it, with the same initial weights in every layout.

Knows roles and modes, but no model family.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.context.context_attention import ContextAttention
from internlm.core.parallel.context.gathered_attention import GatheredAttention
from internlm.core.parallel.context.split_batch import ContextSplit
from internlm.core.parallel.experts.layers import place_tokens_of_experts
from internlm.core.parallel.experts.placement import place_experts
from internlm.core.parallel.linear.float8_shapes import refuse_odd_shape
from internlm.core.parallel.linear.parallel_linear import ParallelGroupedLinear, ParallelLinear
from internlm.core.parallel.linear.weight_gradients import WeightGradients
from internlm.core.parallel.materialize import local_parameter, materialized
from internlm.core.parallel.model_parallel import ModelParallel, ParallelOptions
from internlm.core.parallel.modes.fsp import Fsp
from internlm.core.parallel.modes.isp import Isp
from internlm.core.parallel.modes.msp import Msp
from internlm.core.parallel.modes.mtp import LINEAR_ROLES, Mtp
from internlm.core.parallel.shard_spec import ShardSpec, shard_spec_of
from internlm.model.layer_protocol import ImageModel, PositionedModel, RecomputableLayer
from internlm.model.modules.inner_attention import InnerAttention
from internlm.model.modules.latent_attention import LatentAttention
from internlm.model.modules.linear import Float8Linear, GroupedLinear
from internlm.model.modules.projection_norm import ProjectionNorm
from internlm.model.moe.experts import Experts
from internlm.model.ops.float8 import scaled_gemm as float8
from internlm.model.roles import HeadShape, Role

_MODES: dict[str, type[ModelParallel]] = {"mtp": Mtp, "msp": Msp, "fsp": Fsp, "isp": Isp}


class ParallelEmbedding(nn.Module):
    """A token embedding, split as the mode requires."""

    def __init__(self, weight: nn.Parameter, parallel: ModelParallel) -> None:
        super().__init__()
        self.weight = weight
        self.spec = shard_spec_of(weight)
        self.parallel = parallel

    def forward(self, input_ids: Tensor) -> Tensor:
        """Int64 `[B, S]` -> this rank's part of the residual stream, `[B, S', h]`."""
        return self.parallel.embed(self.weight, self.spec, input_ids)


class Placed(NamedTuple):
    """A parameter, and this rank's spec of it.

    Attributes:
        module: name of the module that holds it.
        attribute: name of the local parameter in that module.
        spec: what this rank holds.
        parameter: the global parameter, on the meta device.
    """

    module: str
    attribute: str
    spec: ShardSpec
    parameter: nn.Parameter


def parallelize(
    model: nn.Module,
    context: ParallelContext,
    *,
    seed: int = 1024,
    options: ParallelOptions | None = None,
    shared: dict[str, nn.Parameter] | None = None,
    weight_gradients: WeightGradients | None = None,
) -> nn.Module:
    """Give every parameter of `model` its ShardSpec and its local, initialized tensor. Changes and returns `model`.

    Linear layers and the embedding are replaced by those of the layout's mode, which becomes `model.parallel`, a
    `ModelParallel`.

    Args:
        model: built under `torch.device("meta")`; may have `roles` (see `internlm.model.roles`).
        context: this rank's position and process groups.
        seed: initial values depend only on this seed and on the global name of a parameter; see `materialize`.
        options: see `ParallelOptions`.
        shared: the parameters of all chunks of this rank so far, by global name and attribute; extended by this call. A
            parameter of several chunks (a tied embedding, if the first and the last stage are on one rank) is shared.
        weight_gradients: shared by all chunks of a rank; None: a new object.

    Raises:
        ConfigError: a weight cannot be split as the layout requires.
        ValueError: a parameter already has storage, or a buffer is on the meta device.
    """
    parallel = _mode_of(model, context, options, weight_gradients)
    parallel.context_split = _context_split_of(model, parallel)
    shared = {} if shared is None else shared
    local: dict[str, dict[str, nn.Parameter]] = {}
    for placed in _place(model, parallel):
        # Two local parameters may hold parts of one global parameter; their attributes differ.
        key = f"{placed.spec.name}/{placed.attribute}"
        if key not in shared:
            shared[key] = _new_parameter(placed, parallel, seed)
        local.setdefault(placed.module, {})[placed.attribute] = shared[key]
    _refuse_meta_buffers(model)
    roles = roles_by_module(model)
    for name, parameters in local.items():
        _install(model, name, roles.get(name, Role.REPLICATED), parameters, parallel)
    _join_layers(model, parallel)
    _split_attention(model, parallel)
    place_tokens_of_experts(model, parallel)
    if isinstance(model, ImageModel):
        model.gather_features = parallel.gather_features
    if isinstance(model, PositionedModel):
        model.own_tokens = parallel.own_tokens
    model.parallel = parallel  # type: ignore[assignment]
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(context.device)
    return model


def shard_specs(
    model: nn.Module, context: ParallelContext, options: ParallelOptions | None = None
) -> Iterator[tuple[str, ShardSpec, nn.Parameter]]:
    """What this rank would hold of a model on the meta device: (global name, spec, global parameter).

    Pure arithmetic: `context` may lack process groups. A parameter held in two parts is yielded twice.
    """
    for placed in _place(model, _mode_of(model, context, options, None)):
        yield placed.spec.name, placed.spec, placed.parameter


def roles_by_module(model: nn.Module) -> dict[str, Role]:
    """Module name -> role, for every module that a pattern of `model.roles` matches; later patterns win."""
    patterns: dict[str, Role] = dict(getattr(model, "roles", {}))
    return {
        name: role
        for pattern, role in patterns.items()
        for name, _ in model.named_modules()
        if fnmatchcase(name, pattern)
    }


def _mode_of(
    model: nn.Module,
    context: ParallelContext,
    options: ParallelOptions | None,
    weight_gradients: WeightGradients | None,
) -> ModelParallel:
    layout = context.layout
    is_trivial = layout.tensor == 1 and not layout.is_isp
    return (ModelParallel if is_trivial else _MODES[layout.mode])(
        context,
        options or ParallelOptions(),
        weight_gradients or WeightGradients(),
        getattr(model, "heads", None),
        getattr(model, "has_tied_head", False),
    )


def _context_split_of(model: nn.Module, parallel: ModelParallel) -> ContextSplit | None:
    context = parallel.context
    if context.size("context") == 1:
        return None
    windows: dict[int | None, int] = getattr(model, "attention_windows", {None: 1})
    index, size = context.index("context"), context.size("context")
    has_latents = any(isinstance(module, LatentAttention) for module in model.modules())
    gathers_keys = has_latents and context.layout.gathers_latents
    sizes = index, size, context.size("tensor")
    return ContextSplit(*sizes, windows, parallel.options.context, gathers_keys=gathers_keys)


def _place(model: nn.Module, parallel: ModelParallel) -> Iterator[Placed]:
    roles = roles_by_module(model)
    first: dict[nn.Parameter, tuple[str, Role]] = {}
    for module_name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{attribute}" if module_name else attribute
            # A weight used twice (tied embeddings) is one parameter, with the name of its first use.
            name, role = first.setdefault(parameter, (full_name, roles.get(module_name, Role.REPLICATED)))
            heads = _heads_of(model.get_submodule(module_name.rpartition(".")[0]), parallel)
            shape = tuple(parameter.shape)
            if role is Role.EXPERTS and parallel.context.layout.splits_experts:
                parts = place_experts(parallel.context, name, attribute, shape)
            else:
                parts = parallel.place(name, attribute, shape, role, heads)
            for part in parts:
                yield Placed(module_name, part.attribute, part.spec, parameter)


def _new_parameter(placed: Placed, parallel: ModelParallel, seed: int) -> nn.Parameter:
    if not placed.parameter.is_meta:
        raise ValueError(
            f'parameter "{placed.spec.name}" already has storage: build the model under torch.device("meta")'
        )
    local = local_parameter(placed.parameter, placed.spec, seed, parallel.context.device)
    return local if parallel.options.defer_weights else materialized(local)


def _refuse_meta_buffers(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ValueError(
                f"buffer '{name}' is on the meta device: compute it where it is used, or create it "
                f'under torch.device("cpu")'
            )


def _install(
    model: nn.Module, name: str, role: Role, parameters: dict[str, nn.Parameter], parallel: ModelParallel
) -> None:
    """Set the local parameters of a module, or replace it by the module of the mode."""
    module = model.get_submodule(name)
    if parallel.replaces_linears and role in LINEAR_ROLES:
        _refuse_unless(module, nn.Linear, name, role)
        _exchange_module(model, name, ParallelLinear(parameters, role, parallel.finish_output(role)))
    elif parallel.replaces_linears and role is Role.EMBEDDING:
        _refuse_unless(module, nn.Embedding, name, role)
        _exchange_module(model, name, ParallelEmbedding(parameters["weight"], parallel))
    elif role in LINEAR_ROLES and parallel.is_float8(name):
        _refuse_unless(module, nn.Linear, name, role)
        refuse_odd_shape(name, shard_spec_of(parameters["weight"]))
        on_hardware = float8.runs_on_hardware(parallel.context.device)
        _exchange_module(model, name, Float8Linear(parameters["weight"], parameters.get("bias"), on_hardware))
    else:
        for attribute, parameter in parameters.items():
            setattr(module, attribute, parameter)


def _refuse_unless(module: nn.Module, kind: type[nn.Module], name: str, role: Role) -> None:
    if not isinstance(module, kind):
        raise ValueError(f"module '{name}' has the role {role.value}, so it must be an nn.{kind.__name__}")


def _exchange_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _join_layers(model: nn.Module, parallel: ModelParallel) -> None:
    """Group the layers of each `GroupedLinear`; every other parallel linear layer is a group of its own.

    In the order of the model, as are the experts that a mode adapts.
    """
    first: dict[nn.Module, tuple[str, GroupedLinear]] = {}
    grouped: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, GroupedLinear):
            layers = module.layers()
            first[layers[0]] = name, module
            grouped.update(layers[1:])
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            parallel.adapt_experts(name, module)
        if not isinstance(module, ParallelLinear) or module in grouped:
            continue
        if module not in first:
            parallel.make_group(name, [module])
            continue
        path, joint = first[module]
        layers = joint.layers()
        refused = [type(layer).__name__ for layer in layers if not isinstance(layer, ParallelLinear)]
        if refused:
            raise ValueError(f"layers of '{path}' need roles of linear layers, all or none: {joint.names}")
        group = parallel.make_group(name, [layer for layer in layers if isinstance(layer, ParallelLinear)])
        _exchange_module(model, path, ParallelGroupedLinear(group))


def _split_attention(model: nn.Module, parallel: ModelParallel) -> None:
    """Adapt every attention block to this rank's heads or tokens.

    Raises:
        ValueError: a block cannot be split, because it has no `heads` or no `InnerAttention`.
    """
    for name, module in list(model.named_modules()):
        heads = _heads_of(module, parallel)
        if heads is not None and hasattr(module, "use_local_heads"):
            module.use_local_heads(parallel.local_heads(heads))
        if isinstance(module, LatentAttention):
            module.share_key = parallel.share_key()
            module.gather_keys = parallel.gather_latents(module)
        for child_name, child in list(module.named_children()):
            if isinstance(child, InnerAttention):
                if heads is None:
                    raise ValueError(f"attention '{name}': give it or the model an attribute `heads`, a HeadShape")
                gathers = isinstance(module, LatentAttention) and module.gather_keys is not None
                inner = GatheredAttention(child) if gathers else parallel.inner_attention(child, heads)
                setattr(module, child_name, inner)
    if parallel.context_split is not None:
        for module in model.modules():
            if isinstance(module, RecomputableLayer):
                # Layers that pass this on to `recomputed` exchange keys and values once.
                setattr(module, "has_saved_operators", True)  # noqa: B010 (optional for a layer)
    for name, role in roles_by_module(model).items():
        block, module = name.rpartition(".")[0], model.get_submodule(name)
        heads = _heads_of(model.get_submodule(block), parallel)
        if isinstance(module, ProjectionNorm) and heads is not None:
            module.sum_over_heads = parallel.sum_over_heads(role, heads)
        has_inner = any(isinstance(m, InnerAttention | ContextAttention) for m in model.get_submodule(block).modules())
        if role is Role.ATTENTION_OUT and parallel.splits_tokens_of_linears and not has_inner:
            raise ValueError(
                f"attention '{block}' has only a part of each sequence in mode isp: put an InnerAttention between its "
                f"projections and '{name}'"
            )


def _heads_of(block: nn.Module, parallel: ModelParallel) -> HeadShape | None:
    """The heads of an attention block: its own, or those of the model."""
    heads: HeadShape | None = getattr(block, "heads", None)
    return heads or parallel.heads
