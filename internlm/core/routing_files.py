"""Files of chosen experts: one array per step and layer, the same for every layout and framework.

`FOLDER/step-N/layer-L.npy` (NumPy's format), N counted from 1 and L from 0 over all layers of the model, is an array of
integers `[rows, positions, k]`: the experts of each position in each row of the global batch. Micro-batches are
consecutive, those of data rank 0 first, and each contributes its rows in order: `micro_bsz` of them, of `seq_len`
positions, or one packed row of `packed_length`. Padding has experts too. The order of the k experts of a token has no
meaning beyond the order of their sum.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internlm.utils.errors import DataError
from internlm.utils.npy_files import map_npy


def path_of_step(folder: Path, step: int) -> Path:
    """The folder of one step."""
    return folder / f"step-{step}"


def path_of_routing(folder: Path, step: int, layer: int) -> Path:
    """The file of one layer in one step."""
    return path_of_step(folder, step) / f"layer-{layer}.npy"


def save_routing(path: Path, experts: NDArray[np.integer]) -> None:
    """Write chosen experts, `[rows, positions, k]`; the file gets its name when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    with partial.open("wb") as file:
        np.save(file, experts.astype(np.int16 if experts.max(initial=0) < 2**15 else np.int32))
    os.replace(partial, path)


def check_layers(folder: Path, step: int, layers: Sequence[int]) -> None:
    """Check that a step has no file of a layer that the model lacks.

    Args:
        folder: of all steps.
        step: whose folder is checked; one that does not exist passes.
        layers: numbers of the model's layers with experts.

    Raises:
        DataError: a file is of another layer.
    """
    own = {path_of_routing(folder, step, layer) for layer in layers}
    others = sorted(set(path_of_step(folder, step).glob("layer-*.npy")) - own)
    if others:
        raise DataError(
            f"{others[0]} is of no layer with experts of this model, whose layers are {list(layers)}: these files are "
            "of another model; give moe.replay.read the folder of this one, or remove the file"
        )


def load_routing(
    path: Path, shape: tuple[int, int, int], num_experts: int, rows: slice, tokens: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Read a part of the chosen experts of a layer; only this part is read from the disk and checked.

    Args:
        path: from `path_of_routing`.
        shape: `[rows, positions, k]` of the whole array.
        num_experts: of the layer.
        rows: of the part.
        tokens: of the part, `[t]`: `position + row * positions of a row`, counted from the first of `rows`.

    Returns:
        `[t, k]` of the part.

    Raises:
        DataError: the file does not exist, cannot be read or has another shape, or a token has an expert that does not
            exist or the same one twice.
    """
    try:
        array = map_npy(path, "write it again, with moe.replay.write or np.save")
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist: moe.replay.read needs the routing of every layer and step of the run; write it "
            "with moe.replay.write and the same data, or train fewer steps"
        ) from error
    if array.dtype.kind not in "iu" or array.shape != shape:
        raise DataError(
            f"{path} has {array.dtype} {list(array.shape)}, and this run needs integers {list(shape)}: rows of the "
            "global batch, positions of a row, experts of a token; use the same model and batches as the run that "
            "wrote it"
        )
    part = array[rows].reshape(-1, shape[2])[tokens].astype(np.int64)
    wrong = (part < 0) | (part >= num_experts)
    in_order = np.sort(part, axis=-1)
    repeated = (in_order[..., 1:] == in_order[..., :-1]).any(-1)
    for found, problem in (
        (wrong.any(-1), f"an expert that is not one of 0 to {num_experts - 1}"),
        (repeated, "the same expert twice"),
    ):
        if found.any():
            first = int(np.flatnonzero(found)[0])
            row, position = divmod(int(tokens[first]), shape[1])
            raise DataError(
                f"{path}: row {rows.start + row}, position {position} has {problem}: {part[first].tolist()}; write "
                "the file again"
            )
    return part
