"""Which experts a rank holds."""

from __future__ import annotations

from dataclasses import replace

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.shard_spec import ShardSpec
from internlm.core.parallel.weight_splits import ParameterShard, ranges_spec
from internlm.utils.errors import ConfigError


def place_experts(context: ParallelContext, name: str, attribute: str, shape: tuple[int, ...]) -> list[ParameterShard]:
    """This rank's part of a weight of all experts of a layer, `[E, ...]`: those of its position on the expert axis.

    The axis folds over data and tensor ranks alike, so the ranks with the same experts are those of `expert_data`.

    Raises:
        ConfigError: the experts cannot be dealt evenly.
    """
    size, index = context.size("expert", "expert"), context.index("expert", "expert")
    if shape[0] % size:
        raise ConfigError(f"the {shape[0]} experts of '{name}' cannot be dealt evenly to {size} expert ranks")
    own = shape[0] // size
    whole = replace(ShardSpec.whole(name, shape), view="expert", data_axis="expert_data", sharded_over=("expert",))
    return [ParameterShard(attribute, ranges_spec(whole, 0, [(index * own, own)]))]
