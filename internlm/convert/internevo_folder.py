"""Joins the weight shards of an InternEvo checkpoint to global tensors of our models, one at a time.

Shapes show how a weight was split. Shards of the global shape are replicas, which must agree; other shards are
concatenated along the one dimension in which they are smaller. Shapes do not show the order of rows in fused weights:

- `wqkv` of INTERNLM and BAICHUAN2: the rows of q, then of k, then of v. A tensor-parallel rank has q, k and v of its
  own heads; a weight-parallel rank (isp) has consecutive rows of the global tensor.
- `wqkv` of the other families: by key-value group, as in this package; ranks have consecutive groups.
- `w13`: the rows of w1, then of w3; per rank or consecutive as above.

Experts have files of their own (`internevo_experts`); shared experts are feed-forward blocks like dense ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from internlm.convert.internevo_files import InternEvoFiles, RankShard
from internlm.convert.internevo_join import RankShards, join, misfit
from internlm.convert.redundant import buffer_difference
from internlm.model.decoder import Decoder
from internlm.utils.errors import CheckpointError

ROWS_BY_PROJECTION = ("INTERNLM", "INTERNLM_MoE", "BAICHUAN2")
"""Families whose fused attention weight has all rows of q, then of k, then of v."""

_FEED_FORWARD = re.compile(r"\.feed_forward(\.shared)?\.w\d+\.")

_MAX_SHOWN = 20


@dataclass(frozen=True)
class RowOrder:
    """The order of rows in fused weights, which shapes do not show.

    Attributes:
        by_projection: fused attention weights have all rows of q, then of k, then of v, instead of groups.
        fused_gate_up: `w1` and `w3` in files of weight-parallel ranks are the two halves of a rank's rows of the fused
            weight, despite their names.
    """

    by_projection: bool
    fused_gate_up: bool


class InternEvoFolder:
    """A `WeightSource` over the files of an InternEvo checkpoint, without its experts.

    Args:
        files: the checkpoint.
        model: to be loaded; may be on the meta device.
        order: of the rows in fused weights.

    Raises:
        CheckpointError: the files contain another model; lists all missing, unexpected and misshapen weights.
    """

    def __init__(self, files: InternEvoFiles, model: Decoder, order: RowOrder) -> None:
        self._files = files
        self._architecture = model.architecture
        self._order = order
        self._shapes = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if ".feed_forward.experts." not in name
        }
        self._dtypes: dict[str, torch.dtype] = {}
        self._swapped = self._has_older_feed_forward()
        self._check()

    def names(self) -> list[str]:
        """Names of the model's weights."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the full weight."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the saved weight."""
        return self._dtypes[name]

    def read(self, name: str, of: RankShards | None = None) -> Tensor:
        """Read a full weight, or its master or moment, to the CPU.

        Args:
            name: of the weight.
            of: source of the shards: None for the weights, else masters or moments, which are split like the weights.

        Raises:
            CheckpointError: replicas of a part differ.
        """
        return self._assemble(name, of or self._files)

    def _check(self) -> None:
        """Assemble every weight on the meta device and compare its shape with the model's."""
        shapes = _Shapes(self._files)
        rope = self._architecture.rope
        differences = [buffer_difference(name, tensor, rope) for name, tensor in self._files.buffers.items()]
        problems = [difference for difference in differences if difference is not None]
        for name, shape in self._shapes.items():
            try:
                weight = self._assemble(name, shapes)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            self._dtypes[name] = weight.dtype
            if tuple(weight.shape) != shape:
                problems.append(f"'{name}' has shape {list(weight.shape)}, the config's model needs {list(shape)}")
        if not problems:
            unexpected = sorted(self._files.names() - shapes.used)
            problems = [f"'{name}' is in the files, but the config's model has no such weight" for name in unexpected]
        if problems:
            shown = "\n  ".join(problems[:_MAX_SHOWN])
            more = f"\n  and {len(problems) - _MAX_SHOWN} more" if len(problems) > _MAX_SHOWN else ""
            raise CheckpointError(f"'{self._files.folder}' does not fit its config:\n  {shown}{more}")

    def _assemble(self, name: str, of: RankShards) -> Tensor:
        """Assemble a full weight from its shards."""
        if ".attention.wqkv." in name:
            if self._has(name) and not self._order.by_projection:
                return self._join(name, self._shapes[name], of)
            a = self._architecture
            parts = [self._projection(name.replace("wqkv", part), of) for part in ("wq", "wk", "wv")]
            groups = [part.unflatten(0, (a.num_kv_heads, -1, a.head_dim)) for part in parts]
            return torch.cat(groups, dim=1).flatten(0, 2)
        if _FEED_FORWARD.search(name) and ".w13." in name:
            return torch.cat([self._gate_or_up(name.replace("w13", part), of) for part in ("w1", "w3")])
        if ".attention.w" in name and ".wo." not in name:
            return self._projection(name, of)
        if _FEED_FORWARD.search(name) and ".w2." not in name:
            return self._gate_or_up(name, of)
        return self._join(self._file_name(name), self._shapes[name], of)

    def _projection(self, name: str, of: RankShards) -> Tensor:
        """`wq`, `wk` or `wv`, read directly or extracted from `wqkv`."""
        a = self._architecture
        heads = (a.num_heads, a.num_kv_heads, a.num_kv_heads)
        number = next(number for number, part in enumerate(("wq", "wk", "wv")) if f".{part}." in name)
        inner = (a.hidden_size,) if name.endswith("weight") else ()
        fused = name.replace(("wq", "wk", "wv")[number] + ".", "wqkv.")
        if not self._has(fused):
            return self._join(name, (heads[number] * a.head_dim, *inner), of)
        shape = (sum(heads) * a.head_dim, *inner)
        if self._order.by_projection:
            return self._rows(fused, shape, heads, number, of)
        groups = self._join(fused, shape, of).unflatten(0, (a.num_kv_heads, -1, a.head_dim))
        rows = groups[:, :-2] if number == 0 else groups[:, number - 3]
        return rows.reshape(-1, *inner)

    def _gate_or_up(self, name: str, of: RankShards) -> Tensor:
        """`w1` or `w3`, read directly or extracted from the fused weight."""
        a = self._architecture
        width = self._width(name)
        inner = (a.hidden_size,) if name.endswith("weight") else ()
        first, second = name.replace(".w3.", ".w1."), name.replace(".w1.", ".w3.")
        number = int(name == second)
        fused = first.replace(".w1.", ".w13.")
        shape = (2 * width, *inner)
        if self._has(fused):
            return self._rows(fused, shape, (1, 1), number, of)
        if self._order.fused_gate_up and self._files.split == "wp":
            ranks = zip(of.shards(first), of.shards(second), strict=True)
            shards = [RankShard(one.file, torch.cat([one.tensor, two.tensor])) for one, two in ranks]
            return join(fused, shape, shards, self._files.split, of.agreed).chunk(2)[number]
        return self._join(self._file_name(name), (width, *inner), of)

    def _rows(self, name: str, shape: tuple[int, ...], ratio: Sequence[int], number: int, of: RankShards) -> Tensor:
        """Part `number` of a fused weight that concatenates parts whose numbers of rows have the given ratio."""
        shards = of.shards(name)
        if self._files.split == "wp" or len(shards) == 1:
            tensors = [join(name, shape, shards, self._files.split, of.agreed)]
        else:
            tensors = [shard.tensor for shard in shards]
        if any(tensor.shape[0] % sum(ratio) for tensor in tensors) or sum(t.shape[0] for t in tensors) != shape[0]:
            raise CheckpointError(misfit(name, shape, shards))
        return torch.cat(
            [tensor.split([tensor.shape[0] * share // sum(ratio) for share in ratio])[number] for tensor in tensors]
        )

    def _join(self, name: str, shape: tuple[int, ...], of: RankShards) -> Tensor:
        return join(name, shape, of.shards(name), self._files.split, of.agreed)

    def _has(self, name: str) -> bool:
        return name in self._files.names()

    def _file_name(self, name: str) -> str:
        """The name of an unfused weight in the files."""
        if not self._swapped or not _FEED_FORWARD.search(name):
            return name
        for one, other in ((".w2.", ".w3."), (".w3.", ".w2.")):
            if one in name:
                return name.replace(one, other)
        return name

    def _width(self, name: str) -> int:
        """Intermediate size of the feed-forward block of a weight."""
        experts = self._architecture.experts
        return experts.shared_width if experts and ".shared." in name else self._architecture.intermediate_size

    def _has_older_feed_forward(self) -> bool:
        """Whether w3 is the down and w2 the up projection, as in the first versions of InternLM; detected by shapes."""
        a = self._architecture
        name = f"layers.0.feed_forward.{'shared.' if 0 in a.layer_kinds else ''}w2.weight"
        width = self._width(name)
        if not self._has(name) or width == a.hidden_size:
            return False
        shards = self._files.shards(name)
        rows = sum(shard.tensor.shape[0] for shard in shards)
        return all(shard.tensor.shape[1] == a.hidden_size for shard in shards) and rows == width


class _Shapes:
    """The shards on the meta device, for checking shapes.

    Attributes:
        used: names of the tensors that were read.
    """

    def __init__(self, files: InternEvoFiles) -> None:
        self.used: set[str] = set()
        self._files = files
        self._known = files.names()

    def shards(self, name: str) -> list[RankShard]:
        if name not in self._known:
            raise CheckpointError(f"'{name}' is missing from the files")
        self.used.add(name)
        return [
            RankShard(shard.file, torch.empty_like(shard.tensor, device="meta")) for shard in self._files.shards(name)
        ]

    def agreed(self, name: str, replicas: Sequence[RankShard]) -> Tensor:
        return replicas[0].tensor
