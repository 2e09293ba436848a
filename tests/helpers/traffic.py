"""What goes over the wire: every collective of a block of code, whoever starts it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = {
    "allreduce_": "all_reduce",
    "_reduce_scatter_base_": "reduce_scatter",
    "_allgather_base_": "all_gather",
    "alltoall_base_": "all_to_all",
}


class Traffic(TorchDispatchMode):
    """Inside `with Traffic() as traffic`, `traffic.num_bytes[(collective, group size)]` adds up buffer sizes.

    The buffer is the whole one: the tensor of an all-reduce, the input of a reduce-scatter, the output of a gather.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(function).partition(".")
        if namespace == "c10d":
            group = next(dist.ProcessGroup.unbox(a) for a in args if type(a).__name__ == "ScriptObject")
            tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
            key = (NAMES[name.removesuffix(".default")], group.size())
            self.num_bytes[key] += max(tensor.nbytes for tensor in tensors)
        return function(*args, **(kwargs or {}))
