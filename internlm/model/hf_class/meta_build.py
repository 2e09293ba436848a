"""Builds modules of transformers without storage for their parameters, and with the buffers that the class computes.

Built on the meta device, a module of transformers loses the contents of its buffers (rotary frequencies, embedding
scales) without a word. Here only parameters go to the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from internlm.model.hf_class.initial_values import FixedValues, attach_initial_values
from internlm.model.initialization import set_initializer
from internlm.utils.errors import ConfigError

M = TypeVar("M", bound=nn.Module)

_MAX_CONSTRUCTED = 1 << 16
"""Elements of the parameters whose values are kept if only the constructor sets them: scalars and vectors."""


def build_on_meta(make: Callable[[], M], dtype: torch.dtype) -> M:
    """Build a `PreTrainedModel` with parameters on the meta device, each with the initializer of its class.

    Persistent buffers, which a class saves with its weights, become parameters that are not trained: checkpoints hold
    parameters.

    Args:
        make: builds the module.
        dtype: of parameters whose dtype the class leaves open; those that it keeps in fp32 stay so.

    Raises:
        ConfigError: the class saves a buffer that is no floating-point tensor, or does not say how it starts.
    """
    from transformers import initialization

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cpu"):
            with _parameters_on_meta() as constructed, initialization.no_init_weights():
                model = make()
            attach_initial_values(model, constructed)
            model.tie_weights()  # type: ignore[operator]
        _keep_in_fp32(model, dtype)
    finally:
        torch.set_default_dtype(default)
    _save_buffers_as_parameters(model)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[dict[nn.Parameter, Tensor]]:
    """Within, modules register their parameters on the meta device. Yields the values of small parameters."""
    register = nn.Module.register_parameter
    constructed: dict[nn.Parameter, Tensor] = {}

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            values = param.detach()
            param = nn.Parameter(values.to("meta"), requires_grad=param.requires_grad)
            if values.numel() <= _MAX_CONSTRUCTED:
                constructed[param] = values
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield constructed
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _keep_in_fp32(model: nn.Module, dtype: torch.dtype) -> None:
    """Put the parameters in fp32 that the class never computes in 16 bits."""
    if dtype not in (torch.bfloat16, torch.float16):
        return
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if kept.intersection([*module_name.split("."), name]):
                parameter.data = parameter.data.float()


def _save_buffers_as_parameters(model: nn.Module) -> None:
    for module_name, module in model.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name in module._non_persistent_buffers_set:
                continue
            if not buffer.is_floating_point():
                raise ConfigError(
                    f"{type(model).__name__} saves '{module_name}.{name}', a tensor of {buffer.dtype}, with its "
                    "weights; checkpoints of this project hold floating-point parameters only"
                )
            values = buffer.detach().clone()
            delattr(module, name)
            parameter = nn.Parameter(torch.empty_like(values, device="meta"), requires_grad=False)
            module.register_parameter(name, parameter)
            set_initializer(parameter, FixedValues(values))
