"""Loads the model of a checkpoint for inference: weights on one device, without optimizer, data or process groups."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from internlm.checkpoint.reading import check_files, load_tensors, read_config
from internlm.checkpoint.run_state import model_tensors
from internlm.checkpoint.save_folder import resolve
from internlm.config.schema import Config
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parallelize import parallelize
from internlm.model.registry import build_model
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath, storage_path

logger = get_logger(__name__)


def load_model_for_inference(
    path: StoragePath | Path | str, device: torch.device | str = "cpu", *, dtype: torch.dtype | None = None
) -> tuple[nn.Module, Config]:
    """The model of a checkpoint, in evaluation mode, and the config it was trained with.

    Args:
        path: a checkpoint, or a save folder, whose newest complete checkpoint is loaded.
        device: device of the weights.
        dtype: in which the model computes; None: that of the run.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is damaged.
    """
    folder = resolve(storage_path(path))
    context = ParallelContext.create(device=device)
    check_files(folder, context)
    config = read_config(folder)
    num_later = config.model.num_nextn_predict_layers
    if num_later:
        logger.info("%s: the %d layer(s) that predict later tokens are for training, and left out", folder, num_later)
    changes: dict[str, object] = {"num_nextn_predict_layers": 0} | ({} if dtype is None else {"dtype": str(dtype)})
    norm_dtype = torch.promote_types(dtype or torch.float32, torch.float32) if config.use_fp32_norm else None
    with torch.device("meta"):
        model = build_model(config.model_type, config.model.model_copy(update=changes), norm_dtype=norm_dtype)
    parallelize(model, context, seed=config.seed)
    load_tensors(folder, model_tensors(model), no_dist=True)
    return model.eval(), config
