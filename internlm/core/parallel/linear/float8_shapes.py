"""Which shapes of a rank's weights fit the tiles of float8 hardware."""

from __future__ import annotations

from internlm.core.parallel.shard_spec import ShardSpec
from internlm.model.ops.float8.scaled_gemm import MULTIPLE
from internlm.utils.errors import ConfigError


def refuse_odd_shape(name: str, spec: ShardSpec) -> None:
    """Check a weight `[out, in]`, or `[experts, out, in]`, whose GEMMs are to run in float8.

    Raises:
        ConfigError: its shape does not fit the tiles of the hardware.
    """
    # Weights that are split over a weight axis are gathered before the GEMM.
    is_gathered = bool({"weight", "expert_weight"} & {*spec.sharded_over})
    shape = (spec.global_shape if is_gathered else spec.local_shape)[-2:]
    if any(size % MULTIPLE for size in shape):
        raise ConfigError(
            f"float8.enable_float8_linear = True: the weight of '{name}' is {list(shape)} on this rank, and float8 "
            f"needs multiples of {MULTIPLE}; change the widths of the model or parallel.tensor.size"
        )
