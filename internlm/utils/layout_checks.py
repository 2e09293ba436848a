"""Which sizes of a parallel layout go together: pure arithmetic, for the library and for the rules of a config.

An error names the arguments of its check. A rule of the config gives them the names of their keys: see `named`.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence

from internlm.utils.errors import ConfigError

CHUNKS_OF_SCHEDULES = {"ZBH1": 1, "ZBV": 2, "DUALPIPEV": 2}
"""Model chunks of a rank under the pipeline schedules that work with one number of them only."""


class LayoutError(ConfigError):
    """Sizes that do not go together.

    Args:
        text: with a field for each argument: `{tensor}` reads as "tensor = 4", `{tensor:name}` as "tensor" and
            `{tensor:value}` as "4".
        arguments: name -> value.
    """

    def __init__(self, text: str, **arguments: object) -> None:
        self._text = text
        self._values = arguments
        super().__init__(self.named({}))

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments involved, in the order of the text."""
        fields = [field for _, field, _, _ in string.Formatter().parse(self._text) if field]
        return tuple(dict.fromkeys(fields))

    def named(self, names: Mapping[str, str]) -> str:
        """The message, with other names for some arguments."""
        fields = {name: _Field(names.get(name, name), value) for name, value in self._values.items()}
        return self._text.format(**fields)


class _Field:
    def __init__(self, name: str, value: object) -> None:
        self.name = name
        self.value = value

    def __format__(self, spec: str) -> str:
        return {"": f"{self.name} = {self.value!r}", "name": self.name, "value": str(self.value)}[spec]


def check_heads(num_heads: int, num_kv_heads: int, tensor: int) -> None:
    """A tensor rank computes whole query heads, with whole key-value heads or a copy of one.

    Raises:
        LayoutError: `tensor` ranks cannot.
    """
    fitting = [n for n in _divisors(num_heads) if num_kv_heads % n == 0 or n % num_kv_heads == 0]
    fix = f"use a tensor size of {', '.join(map(str, fitting))}"
    if num_heads % tensor:
        text = "{num_heads} is not divisible by {tensor}: each rank computes whole heads; "
        raise LayoutError(text + fix, num_heads=num_heads, tensor=tensor)
    if tensor not in fitting:
        text = (
            "{num_kv_heads} and {tensor}: one must divide the other, as each rank holds whole key-value heads or a "
            "copy of one; "
        )
        raise LayoutError(text + fix, num_kv_heads=num_kv_heads, tensor=tensor)


def check_width(width: int, tensor: int) -> None:
    """Tensor ranks compute equal parts of a feed-forward block.

    Raises:
        LayoutError: the parts are not equal.
    """
    if width % tensor:
        fix = f"set {{width:name}} = {next_multiple(width, tensor)}"
        raise LayoutError("{width} is not divisible by {tensor}; " + fix, width=width, tensor=tensor)


def check_integers(**sizes: object) -> None:
    """Sizes are integers.

    Raises:
        LayoutError: one is not.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise LayoutError(f"{{{name}}}: it must be an integer", **{name: size})


def check_world(world_size: int, **degrees: int) -> int:
    """The ranks left when the world is divided by some degrees.

    Raises:
        LayoutError: a degree is below 1, or they do not divide it.
    """
    for name, degree in degrees.items():
        if degree < 1:
            raise LayoutError(f"{{{name}}}: it must be 1 or more", **{name: degree})
    product = math.prod(degrees.values())
    if world_size % product:
        factors = " times ".join(f"{{{name}}}" for name in degrees)
        text = (
            f"{factors} does not divide the world size {{world_size:value}}; start a multiple of {product} ranks or "
            "make the parallel sizes smaller"
        )
        raise LayoutError(text, world_size=world_size, **degrees)
    return world_size // product


def check_zero(zero: int, data: int) -> None:
    """The optimizer state is split over a divisor of the ranks that hold the same weights; below 1: over all.

    Raises:
        LayoutError: `zero` is no divisor.
    """
    if zero > 0 and data % zero:
        allowed = ", ".join(map(str, _divisors(data)))
        text = "{zero} does not divide the {data:value} ranks of the same weights; use -1 (all of them) or one of "
        raise LayoutError(text + allowed, zero=zero, data=data)


def check_weight(weight: int, mode: str) -> None:
    """A weight degree is part of isp.

    Raises:
        LayoutError: another mode has one.
    """
    if weight > 1 and mode != "isp":
        text = "{weight} needs {mode:name} = 'isp', which is {mode:value}; set the mode to 'isp' or the size to 1"
        raise LayoutError(text, weight=weight, mode=mode)


def check_head_first(head_first: bool, mode: str) -> None:
    """Only isp may place context ranks next to each other: the other modes share weights over neighboring ranks.

    Raises:
        LayoutError: another mode does.
    """
    if not head_first and mode != "isp":
        text = "{head_first} needs {mode:name} = 'isp', which is {mode:value}; set it to True"
        raise LayoutError(text, head_first=head_first, mode=mode)


def check_window(window_size: int, context: int, *, interleaved: bool = False) -> None:
    """The windows of a double ring are equal, and interleaved in pairs.

    Raises:
        LayoutError: they cannot be.
    """
    if context % window_size:
        allowed = ", ".join(map(str, _divisors(context)))
        text = "{window_size} does not divide {context}; use " + allowed
        raise LayoutError(text, window_size=window_size, context=context)
    if interleaved and context // window_size % 2:
        text = f"{{interleaved}} needs an even number of windows, and there are {context // window_size}: "
        text += "{context} over {window_size}; set it to False"
        raise LayoutError(text, interleaved=interleaved, context=context, window_size=window_size)


def check_expert_tensor(expert_tensor: int, tensor: int) -> None:
    """An expert is on one rank, or split over the tensor ranks.

    Raises:
        LayoutError: it is split otherwise.
    """
    if expert_tensor not in (1, tensor):
        text = "{expert_tensor} must be 1 or {tensor}: experts are split over all tensor ranks or none"
        raise LayoutError(text, expert_tensor=expert_tensor, tensor=tensor)


def check_fsdp(fsdp: bool, pipeline: int, mode: str) -> None:
    """FSDP goes with neither a pipeline nor isp.

    Raises:
        LayoutError: it is on with one of them.
    """
    if fsdp and pipeline > 1:
        text = "{fsdp} does not work with {pipeline}; set one of them to its default"
        raise LayoutError(text, fsdp=fsdp, pipeline=pipeline)
    if fsdp and mode == "isp":
        text = "{fsdp} does not work with {mode}, which splits weights itself; turn it off"
        raise LayoutError(text, fsdp=fsdp, mode=mode)


def check_schedule(mode: str, num_ranks: int, num_chunks: int, num_micro_batches: int) -> None:
    """A pipeline schedule works with these numbers.

    Args:
        mode: "1F1B", "ZBH1", "ZBV" or "DUALPIPEV".
        num_ranks: ranks of the pipeline.
        num_chunks: model chunks of a rank.
        num_micro_batches: of a step.

    Raises:
        LayoutError: it does not.
    """
    if num_micro_batches < 1:
        raise LayoutError("{num_micro_batches}: a step has 1 or more", num_micro_batches=num_micro_batches)
    if num_ranks == 1:
        return
    needed = CHUNKS_OF_SCHEDULES.get(mode, num_chunks)
    if num_chunks != needed:
        text = "{num_chunks} does not work with {mode}; set it to " + str(needed)
        raise LayoutError(text, num_chunks=num_chunks, mode=mode)
    if mode == "1F1B" and num_chunks > 1 and num_micro_batches % num_ranks:
        text = "{num_micro_batches}: the interleaved schedule ({num_chunks}) needs a multiple of {num_ranks}"
        raise LayoutError(text, num_micro_batches=num_micro_batches, num_chunks=num_chunks, num_ranks=num_ranks)


def check_layer_split(num_layers: int, num_stages: int, sizes: Sequence[int] | None = None) -> None:
    """Every pipeline stage gets a layer, and the sizes that a user gives add up.

    Raises:
        LayoutError: a stage gets none, or `sizes` do not fit.
    """
    if num_layers < num_stages:
        text = "{num_stages} is more than {num_layers}, and each stage needs a layer; use fewer stages"
        raise LayoutError(text, num_stages=num_stages, num_layers=num_layers)
    if sizes is None:
        return
    sizes = list(sizes)
    if len(sizes) != num_stages:
        text = "{sizes} must have {num_stages:value} numbers, one for each stage ({num_stages})"
        raise LayoutError(text, sizes=sizes, num_stages=num_stages)
    if min(sizes) < 1:
        raise LayoutError("{sizes}: each stage needs a layer", sizes=sizes)
    if sum(sizes) != num_layers:
        text = f"{{sizes}} are {sum(sizes)} layers, and must be {{num_layers}}"
        raise LayoutError(text, sizes=sizes, num_layers=num_layers)


def next_multiple(number: int, of: int) -> int:
    """The smallest multiple of `of` that is at least `number`."""
    return -(-number // of) * of


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
