"""The expert files of an InternEvo checkpoint: `model_moe_layer{l}_expert{e}_tp{t}.pt`, or `_wp{w}` of isp.

Files are read when an expert is needed and not kept. `e` counts the experts of a layer or, if they are grouped, the
expert parallel ranks (`internevo_expert_forms`). `l` counts the expert layers of a pipeline stage, from
`stage * (num_layers // num_stages)`. These are the numbers of the model only if stages are equal and in order, so
they are mapped by stage and position.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from internlm.checkpoint.internevo import EXPERT_FILE
from internlm.convert.internevo_expert_forms import ExpertForm, ExpertSizes, Form
from internlm.convert.internevo_files import LAYER, InternEvoFiles, RankShard, load_file, weights_in
from internlm.utils.errors import CheckpointError

_EXPERT = re.compile(r"feed_forward\.moe_layer\.experts\.wrapped_experts\.(\d+)\.(w1|w2|w3)\.weight")
_MEGABLOCKS = re.compile(r"feed_forward\.moe_layer\.experts\.wrapped_experts\.\d+\.w[123]")
_STACKED = re.compile(r"layers\.(\d+)\.feed_forward\.experts\.(w13|w2)")
_PROJECTIONS = ("w1", "w2", "w3")
_MAX_SHOWN = 4


def expert_files(files: InternEvoFiles) -> list[str]:
    """Names of the expert files in the folder."""
    return sorted(path.name for path in files.folder.iterdir() if EXPERT_FILE.fullmatch(path.name))


class InternEvoExperts:
    """The experts of an InternEvo checkpoint, read one at a time.

    Args:
        files: the other weights of the checkpoint.
        sizes: of the model.
        is_grouped: `model.moe_layer_kwargs.use_grouped_mlp`; None if the config omits it.
        fused_gate_up: see `RowOrder`.

    Attributes:
        num_ranks: number of ranks over which an expert is split.
        num_groups: number of expert files of a layer and rank.

    Raises:
        CheckpointError: a file is missing, surplus or damaged, or does not fit the sizes.
    """

    def __init__(
        self, files: InternEvoFiles, sizes: ExpertSizes, *, is_grouped: bool | None, fused_gate_up: bool
    ) -> None:
        self._files = files
        self._sizes = sizes
        self._numbers = _numbers_in_names(files)
        names = self._names_by_place()
        form = self._form_of(names, is_grouped)
        self.num_groups, self.num_ranks = self._grid(names, form)
        swapped = form == "separate" and self._has_older_names(next(iter(self._numbers)))
        self._per_group = sizes.num_experts // self.num_groups
        self._form = ExpertForm(form, sizes, self._per_group, files.split, fused_gate_up, swapped)
        self._dtypes: dict[str, torch.dtype] = {}
        for layer in self._numbers:
            self._check(layer)

    def names(self) -> list[str]:
        """Our names of the experts' weights."""
        return [f"layers.{layer}.feed_forward.experts.{part}" for layer in self._numbers for part in ("w13", "w2")]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of all experts of a layer."""
        s = self._sizes
        width = (2 * s.width, s.hidden_size) if name.endswith("w13") else (s.hidden_size, s.width)
        return (s.num_experts, *width)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the weight."""
        return self._dtypes[name]

    def read(self, name: str, expert: int) -> Tensor:
        """Read an expert: `[2f, h]` of w13, `[h, f]` of w2.

        Raises:
            CheckpointError: a file is damaged, or replicas differ.
        """
        match = _STACKED.fullmatch(name)
        assert match is not None, name
        layer = int(match[1])
        shards = self._load(layer, expert // self._per_group)
        return self._form.assemble(layer, match[2], expert, shards, self._files.agreed)

    # -- files ----------------------------------------------------------------------------------------------------

    def _name(self, number: int, group: int, rank: int) -> str:
        return f"model_moe_layer{number}_expert{group}_{self._files.split}{rank}.pt"

    def _names_by_place(self) -> dict[tuple[int, int, int], str]:
        """(layer number in the name, expert or group, rank) -> file name."""
        folder = self._files.folder
        found: dict[tuple[int, int, int], str] = {}
        for name in expert_files(self._files):
            match = EXPERT_FILE.fullmatch(name)
            assert match is not None
            if match["split"] != self._files.split:
                raise CheckpointError(
                    f"'{folder / name}' is of a {match['split']} rank, unlike the files of the other weights: two "
                    "saves in one folder"
                )
            place = (int(match["layer"]), int(match["expert"]), int(match["rank"]))
            if place in found:
                raise CheckpointError(f"'{folder}' has the same expert twice: {found[place]} and {name}")
            found[place] = name
        if not found:
            raise CheckpointError(
                f"'{folder}' has no expert files (model_moe_layer*_expert*_{self._files.split}*.pt), but the config's "
                f"model has {self._sizes.num_experts} experts"
            )
        return found

    def _grid(self, names: Mapping[tuple[int, int, int], str], form: Form) -> tuple[int, int]:
        """Number of expert files of a layer and rank, and number of ranks; all combinations must exist."""
        num_experts, folder = self._sizes.num_experts, self._files.folder
        num_ranks = 1 + max(rank for _, _, rank in names)
        num_groups = 1 + max(group for _, group, _ in names) if form != "separate" else num_experts
        if num_experts % num_groups:
            raise CheckpointError(
                f"'{folder}' has {num_groups} files of grouped experts for each layer, which does not divide "
                f"model.num_experts = {num_experts}: files are missing, or belong to another model"
            )
        expected = {
            (number, group, rank)
            for number, _ in self._numbers.values()
            for group in range(num_groups)
            for rank in range(num_ranks)
        }
        missing = [self._name(*place) for place in sorted(expected - names.keys())]
        surplus = [names[place] for place in sorted(names.keys() - expected)]
        described = f"{len(self._numbers)} expert layers of {num_experts} experts in {num_groups} x {num_ranks} file(s)"
        if missing:
            raise CheckpointError(f"'{folder}' is incomplete: of {described}, missing: {_listed(missing)}")
        if surplus:
            raise CheckpointError(f"'{folder}' has expert files beyond those of {described}: {_listed(surplus)}")
        return num_groups, num_ranks

    def _load(self, layer: int, group: int) -> dict[str, list[RankShard]]:
        """The shards of each projection in the files of a layer and group; tensors are memory-mapped."""
        number, place = self._numbers[layer]
        shards: dict[str, list[RankShard]] = {projection: [] for projection in _PROJECTIONS}
        for rank in range(self.num_ranks):
            name = self._name(number, group, rank)
            tensors = self._tensors(name, layer, group, place)
            for projection in _PROJECTIONS:
                shards[projection].append(RankShard(name, tensors[projection]))
        return shards

    def _tensors(self, name: str, layer: int, group: int, place: tuple[int, int]) -> dict[str, Tensor]:
        """Projection -> tensor of one file.

        Args:
            name: of the file.
            layer: number in the model.
            group: expert or group in the file's name.
            place: (chunk, number) of the layer in the files of its stage.
        """
        path, tensors = self._files.folder / name, {}
        for (chunk, key), tensor in weights_in(load_file(path, mapped=True), path):
            in_layer = LAYER.fullmatch(key)
            match = _EXPERT.fullmatch(in_layer[2]) if in_layer else None
            if in_layer is None or match is None:
                is_megablocks = in_layer is not None and _MEGABLOCKS.fullmatch(in_layer[2])
                reason = ": weights of MegaBlock layers cannot be imported" if is_megablocks else ""
                raise CheckpointError(f"'{path}' contains '{key}', which is not a weight of an expert here{reason}")
            if int(match[1]) != group:
                raise CheckpointError(f"'{path}' contains expert {match[1]} ('{key}'): the file has another's name")
            if (chunk, int(in_layer[1])) != place:
                raise CheckpointError(
                    f"'{path}' contains '{key}', but the layer with this file name, {layer}, is number {place[1]} of "
                    "its stage: the file is of another layer or another run"
                )
            tensors[match[2]] = tensor
        missing = [f"{projection}.weight" for projection in _PROJECTIONS if projection not in tensors]
        if missing:
            raise CheckpointError(f"'{path}' has no {', '.join(missing)}")
        return tensors

    def _check(self, layer: int) -> None:
        """Assemble the experts of a layer on the meta device, and record dtypes."""
        for group in range(self.num_groups):
            shards = {
                projection: [RankShard(shard.file, torch.empty_like(shard.tensor, device="meta")) for shard in shards]
                for projection, shards in self._load(layer, group).items()
            }
            for part in ("w13", "w2"):
                name = f"layers.{layer}.feed_forward.experts.{part}"
                expert = (group + 1) * self._per_group - 1
                dtype = self._form.assemble(layer, part, expert, shards, lambda _, replicas: replicas[0].tensor).dtype
                if self._dtypes.setdefault(name, dtype) != dtype:
                    raise CheckpointError(
                        f"'{self._files.folder}': the experts of layer {layer} have different dtypes: "
                        f"{self._dtypes[name]}, and {dtype} in {shards['w1'][0].file}"
                    )

    # -- forms ----------------------------------------------------------------------------------------------------

    def _form_of(self, names: Mapping[tuple[int, int, int], str], is_grouped: bool | None) -> Form:
        """The form of all files, from the shapes in those of one expert or group.

        Raises:
            CheckpointError: shapes and config do not show the form.
        """
        number, group, _ = min(names)
        shapes = [self._shape_of_w1(name) for place, name in names.items() if place[:2] == (number, group)]
        h, f = self._sizes.hidden_size, self._sizes.width
        if len(shapes[0]) == 3:
            return "grouped"
        if self._files.split == "tp":
            return "separate"
        # Rows are split; columns are the input features of a separate expert, and the output features otherwise.
        if h != f:
            return "grouped rows" if shapes[0][-1] == f else "separate"
        if sum(shape[0] for shape in shapes) > f:
            return "grouped rows"
        if is_grouped is None:
            raise CheckpointError(
                f"'{self._files.folder / self._name(number, group, 0)}': the widths of experts and of the residual "
                f"stream are both {f}, so shapes do not show whether weights are transposed; give --config FILE with "
                "model.moe_layer_kwargs.use_grouped_mlp of the run (True if it used grouped GEMMs)"
            )
        return "grouped rows" if is_grouped else "separate"

    def _shape_of_w1(self, name: str) -> tuple[int, ...]:
        path = self._files.folder / name
        shapes = [tuple(t.shape) for (_, key), t in weights_in(load_file(path, mapped=True), path) if ".w1" in key]
        if not shapes or len(shapes[0]) not in (2, 3):
            raise CheckpointError(f"'{path}' has no weight w1 of an expert")
        return shapes[0]

    def _has_older_names(self, layer: int) -> bool:
        """Whether w3 is the down and w2 the up projection, as in the first versions of InternLM; detected by shapes."""
        h, f = self._sizes.hidden_size, self._sizes.width
        if h == f:
            return False
        tensors = [shard.tensor for shard in self._load(layer, 0)["w2"]]
        return all(t.dim() == 2 and t.shape[1] == h for t in tensors) and sum(t.shape[0] for t in tensors) == f


def _numbers_in_names(files: InternEvoFiles) -> dict[int, tuple[int, tuple[int, int]]]:
    """Expert layer in the model -> its number in file names, and its place (chunk, number) in the files of its stage.

    Raises:
        CheckpointError: InternEvo has given two layers the same number, and written one over the other.
    """
    per_stage = sum(map(len, files.layer_numbers)) // files.num_stages
    weights, result = files.names(), {}
    layer_of: dict[int, int] = {}
    for stage, layers in enumerate(files.layer_numbers):
        number = stage * per_stage
        for place, layer in layers.items():
            if f"layers.{layer}.feed_forward.router.weight" not in weights:
                continue
            if number in layer_of:
                sizes = [len(one) for one in files.layer_numbers]
                raise CheckpointError(
                    f"'{files.folder}': InternEvo has saved the experts of layers {layer_of[number]} and {layer} under "
                    f"the same names (model_moe_layer{number}_*.pt), because it numbers those of a stage from "
                    f"stage * {per_stage} and the stages have {sizes} layers. Those of one layer are lost; save the "
                    "run again with stages of equal size"
                )
            layer_of[number] = layer
            result[layer] = (number, place)
            number += 1
    return result


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return f"{', '.join(names[:_MAX_SHOWN])}{more}"
