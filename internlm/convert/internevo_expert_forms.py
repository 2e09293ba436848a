"""The forms in which InternEvo stores experts, and their translation to ours.

- separate: a file for each expert, whose weights are `[f, h]` (w1, w3) and `[h, f]` (w2), as those of a dense layer;
- grouped (`use_grouped_mlp`): a file for each expert parallel rank. All its experts are in one tensor per projection,
  transposed: `[E/ep, h, f]` (w1, w3) and `[E/ep, f, h]` (w2);
- grouped rows: the same of isp, as matrices `[E/ep * h, f]` and `[E/ep * f, h]` whose rows are split over the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from internlm.convert.internevo_files import RankShard
from internlm.convert.internevo_join import Agreed, join
from internlm.utils.errors import CheckpointError

Form = Literal["separate", "grouped", "grouped rows"]


@dataclass(frozen=True)
class ExpertSizes:
    """Sizes of the experts in a model.

    Attributes:
        num_experts: experts of a layer.
        hidden_size: width of the residual stream.
        width: intermediate size of an expert.
    """

    num_experts: int
    hidden_size: int
    width: int


@dataclass(frozen=True)
class ExpertForm:
    """How the files of a checkpoint store experts.

    Attributes:
        form: see the module docstring.
        sizes: of the model.
        per_group: experts in a file.
        split: "tp" or "wp", see `InternEvoFiles`.
        fused_gate_up: see `RowOrder`.
        swapped: w3 is the down and w2 the up projection.
    """

    form: Form
    sizes: ExpertSizes
    per_group: int
    split: str
    fused_gate_up: bool
    swapped: bool

    def assemble(
        self, layer: int, part: str, expert: int, shards: Mapping[str, Sequence[RankShard]], agreed: Agreed
    ) -> Tensor:
        """An expert of w13 or w2, from the shards of its file or group."""

        def projection(name: str) -> Tensor:
            return self._projection(layer, name, expert, shards, agreed)

        return projection("w2") if part == "w2" else torch.cat([projection("w1"), projection("w3")])

    def _projection(
        self, layer: int, projection: str, expert: int, shards: Mapping[str, Sequence[RankShard]], agreed: Agreed
    ) -> Tensor:
        """`[f, h]` of w1 and w3, `[h, f]` of w2."""
        h, f = self.sizes.hidden_size, self.sizes.width
        name = f"layers.{layer}.feed_forward.experts.{expert}.{projection}"
        shape = (h, f) if projection == "w2" else (f, h)
        split = self.split
        if self.form == "separate":
            if self.fused_gate_up and self.split == "wp" and projection != "w2":
                ranks = zip(shards["w1"], shards["w3"], strict=True)
                rows = [RankShard(one.file, torch.cat([one.tensor, two.tensor])) for one, two in ranks]
                return join(name, (2 * f, h), rows, split, agreed).chunk(2)[int(projection == "w3")]
            stored = {"w2": "w3", "w3": "w2"}.get(projection, projection) if self.swapped else projection
            return join(name, shape, shards[stored], split, agreed)
        transposed, local = (shape[1], shape[0]), expert % self.per_group
        own = [self._own_experts(shard, name) for shard in shards[projection]]
        if self.form == "grouped":
            parts = [RankShard(shard.file, shard.tensor[local]) for shard in own]
            return join(name, transposed, parts, split, agreed).T
        parts, offset, first = [], 0, local * transposed[0]
        for shard in own:
            start, stop = first - offset, first + transposed[0] - offset
            size = shard.tensor.shape[0]
            if start < size and stop > 0:
                parts.append(RankShard(shard.file, shard.tensor[max(start, 0) : min(stop, size)]))
            offset += size
        if offset != self.per_group * transposed[0]:
            files = ", ".join(f"{shard.file} {list(shard.tensor.shape)}" for shard in own[:4])
            raise CheckpointError(
                f"'{name}' is one of {self.per_group} grouped experts, which have {self.per_group * transposed[0]} "
                f"rows; the files have {files}"
            )
        return join(name, transposed, parts, split, agreed).T

    def _own_experts(self, shard: RankShard, name: str) -> RankShard:
        """Check the dimensions of a shard of grouped experts."""
        is_flat = self.form == "grouped rows"
        if shard.tensor.dim() != (2 if is_flat else 3) or not (is_flat or shard.tensor.shape[0] == self.per_group):
            raise CheckpointError(
                f"'{name}' is one of {self.per_group} grouped experts; {shard.file} has shape "
                f"{list(shard.tensor.shape)}"
            )
        return shard
