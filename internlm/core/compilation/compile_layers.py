"""torch.compile, layer by layer: all layers of a kind share one compiled graph, and hooks stay outside of it."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from internlm.core.compilation import cuda_graphs as graphs
from internlm.core.parallel.context.context_attention import ContextAttention
from internlm.core.parallel.context.gathered_attention import GatheredAttention
from internlm.core.parallel.experts.exchanged_experts import ExchangedExperts
from internlm.core.parallel.layers import layers_of
from internlm.core.parallel.linear.parallel_linear import ParallelGroupedLinear, ParallelLinear
from internlm.core.parallel.model_parallel import parallel_of
from internlm.core.parallel.ulysses_attention import UlyssesAttention
from internlm.model.hf_class.attention import CappedAttention
from internlm.model.hf_class.layers import RecomputableMixin
from internlm.model.layer_protocol import RecomputableLayer
from internlm.model.modules.attention import Attention
from internlm.model.modules.attention_sinks import AttentionSinks
from internlm.model.modules.latent_attention import LatentAttention
from internlm.model.modules.projection_norm import ProjectionNorm
from internlm.model.moe.experts import Experts
from internlm.model.moe.feed_forward import MoeFeedForward
from internlm.model.moe.router import Router
from internlm.model.ops.grouped_linear import grouped_linear
from internlm.utils.cpp_extension import cpp_compiler, cpp_compilers
from internlm.utils.errors import ConfigError

_RECOMPILE_LIMIT = 64
"""Compiled variants of a layer: training and evaluation, shapes, windows. PyTorch's default of 8 is too few."""


def compile_layers(model: nn.Module, *, backend: str = "inductor", cuda_graphs: bool = False) -> nn.Module:
    """Compile every layer of `model` when it is first called. Changes and returns `model`.

    A layer of plain modules becomes one graph, forward and backward, with its router and experts. Other layers are cut:
    linear layers that communicate or postpone weight gradients, attention with sinks or capped scores, and routers and
    experts where ranks exchange tokens, in float8, or with capacity or noise, run eagerly, and the code between them is
    compiled. So is what the compiler can of a layer of transformers.

    Args:
        model: after `parallelize`, before FSDP.
        backend: of torch.compile.
        cuda_graphs: replay each layer's passes as CUDA graphs; see `internlm.core.compilation.cuda_graphs` for its
            conditions. Not with FSDP or offloading.

    Raises:
        ValueError: this model cannot run as CUDA graphs.
    """
    if cuda_graphs:
        graphs.prepare_passes(model)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    layout = parallel_of(model).context.layout
    for module in model.modules():
        if isinstance(module, ParallelGroupedLinear | ParallelLinear):
            # Not as a decorator of the class: importing the compiler takes a second, and most runs never compile.
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
        if isinstance(module, UlyssesAttention):
            # Only the all-to-alls; attention between them is compiled.
            module.gather_tokens = torch.compiler.disable(module.gather_tokens)  # type: ignore[method-assign]
            module.scatter_tokens = torch.compiler.disable(module.scatter_tokens)  # type: ignore[method-assign]
        if isinstance(module, ContextAttention | GatheredAttention):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
        if isinstance(module, ProjectionNorm) and module.sum_over_heads is not None:
            module.sum_over_heads = torch.compiler.disable(module.sum_over_heads)
        if isinstance(module, LatentAttention) and module.share_key is not None:
            module.share_key = torch.compiler.disable(module.share_key)
        if isinstance(module, LatentAttention) and module.gather_keys is not None:
            module.gather_keys = torch.compiler.disable(module.gather_keys)
        if isinstance(module, MoeFeedForward) and layout.exchanges_tokens_of_experts:
            # Exchanges are not compiled, and recomputation would see other pieces between them.
            for name in ("take_tokens", "share_routing", "return_tokens"):
                setattr(module, name, torch.compiler.disable(getattr(module, name)))
    for layer in layers_of(model):
        # The forward function, not the module: hooks that wait for weights cannot be compiled.
        if not parallel_of(model).replaces_linears and _is_one_graph(layer):
            mode = graphs.MODE if cuda_graphs else None
            layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=True, mode=mode)
            continue
        _cut(layer)
        if isinstance(layer, RecomputableLayer):
            # Recomputation wraps the compiled parts: its save policy must see the operators of the eager linear layers.
            layer.compute = torch.compile(layer.compute, backend=backend)  # type: ignore[method-assign]
        else:
            layer.forward = torch.compile(layer.forward, backend=backend)
    return model


def _is_one_graph(layer: nn.Module) -> bool:
    """Whether nothing in the layer, linear layers aside, communicates or has a shape that depends on values.

    Not known of layers of transformers.
    """
    return not isinstance(layer, RecomputableMixin) and not any(
        isinstance(module, ContextAttention | GatheredAttention | ExchangedExperts | AttentionSinks)
        or (isinstance(module, Router) and module.selection.needs_positions)
        or (isinstance(module, Experts) and module.linear13 is not grouped_linear)
        for module in layer.modules()
    )


def _cut(layer: nn.Module) -> None:
    """Let attention with sinks, routers and experts run eagerly."""
    for module in layer.modules():
        if isinstance(module, Attention) and module.sinks is not None:
            # The log-sum-exp is computed document by document.
            module.inner.forward = torch.compiler.disable(module.inner.forward)  # type: ignore[method-assign]
        if isinstance(module, CappedAttention):
            # Computed document by document.
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
        if isinstance(module, Router | Experts | ExchangedExperts):
            # Recomputation around compiled parts saves results of routers, whose memory these parts would use again.
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
        if isinstance(module, ExchangedExperts):
            module.start = torch.compiler.disable(module.start)  # type: ignore[method-assign]


def check_compiler(device: torch.device, *, key: str) -> None:
    """Check before the first step that compiling for `device` can work.

    Args:
        device: of the run.
        key: of the config, in messages.

    Raises:
        ConfigError: a compiler that PyTorch needs for this device is not installed.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            f"{key} = True: the package triton, with which PyTorch compiles for GPUs, is not installed; install "
            f"it, or set {key} = False"
        )
    if device.type == "cpu" and cpp_compiler() is None:
        raise ConfigError(
            f"{key} = True: no C++ compiler was found ({' or '.join(cpp_compilers())}), with which PyTorch compiles "
            f"for CPUs; install one, name it in the environment variable CXX, or set {key} = False"
        )
