"""Finds what would make the host wait for a GPU, on a machine that has none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(__file__).parents[2] / "internlm"

# Operators whose result's shape, or a number for Python, depends on values on the device.
READING_OPERATORS = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "bincount", "repeat_interleave",
}  # fmt: skip
# Methods that give values to Python without an operator: on CPU, PyTorch reads the memory.
READING_METHODS = {"tolist", "numpy", "cpu", "__array__"}


class _Calls(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in READING_METHODS:
            self._found.append(_where(name))
        elif name in ("tensor", "as_tensor") and kwargs.get("device") is not None:
            # A copy from memory that is not pinned, for which the host waits.
            self._found.append(_where(name))
        elif name == "to" and not kwargs.get("non_blocking") and _names_device(args, kwargs):
            self._found.append(_where("to(device)"))
        return func(*args, **kwargs)


def _names_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return "device" in kwargs or any(isinstance(value, (str, torch.device)) for value in args[1:])


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # With the size of its result, it reads the repeats on the device.
        is_told_size = name == "repeat_interleave" and (kwargs or {}).get("output_size") is not None
        if name in READING_OPERATORS and not is_told_size:
            self._found.append(_where(name))
        elif name.startswith("index") and any(_is_mask(index) for arg in args for index in _items(arg)):
            self._found.append(_where("index by a mask"))
        return func(*args, **(kwargs or {}))


def _items(arg: Any) -> list[Any]:
    return list(arg) if isinstance(arg, (list, tuple)) else []


def _is_mask(index: Any) -> bool:
    """Whether an index selects by its values, so that the size of the result is not known without them."""
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _where(what: str) -> str:
    """`file: function: what`, of the innermost frame in the package; of any frame when none is."""
    frame: Any = sys._getframe(2)
    outermost = frame
    while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
        frame = frame.f_back
    code = (frame or outermost).f_code
    path = Path(code.co_filename)
    shown = path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else path.name
    return f"{shown}: {code.co_name}: {what}"


@contextmanager
def host_waits() -> Iterator[list[str]]:
    """Collects, while open and in this thread, each place that would wait for the device if tensors were on one.

    Values read by Python, operators whose result's shape depends on values, and copies to a device that the host waits
    for. Tensors that would stay on the host are not told apart: whoever asks knows them.
    """
    found: list[str] = []
    with _Operators(found), _Calls(found):
        yield found
