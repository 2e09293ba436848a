"""Rules on the steps of a run: batches, saving, schedules, dtypes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from internlm.config.compare import keys_that_change_outputs
from internlm.config.problem import Problem
from internlm.config.schema import Config
from internlm.config.schema.data import XTUNER_NAMES
from internlm.utils.errors import ConfigError, nearest
from internlm.utils.storage import storage_path

_SKIP = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_RAMP = re.compile(r"\d+ +\d+ +\d+")


def accumulation(config: Config, world_size: int) -> Iterator[Problem]:
    """Without a pipeline, `gradient_accumulation` must be the number of micro-batches."""
    data = config.data
    if config.parallel.pipeline.size == 1 and data.gradient_accumulation != data.micro_num:
        yield Problem(
            ("data.gradient_accumulation", "data.micro_num"),
            f"data.gradient_accumulation = {data.gradient_accumulation} must equal data.micro_num = {data.micro_num}; "
            "leave it out",
        )


def token_arrays(config: Config, world_size: int) -> Iterator[Problem]:
    """The keys of token arrays are for no other type of data."""
    data = config.data
    for name in ("array_dtype", "array_separator"):
        value = getattr(data, name)
        if value is not None and data.type != "arrays":
            key = f"data.{name}"
            yield Problem(
                (key, "data.type"), f"{key} = {value!r} needs data.type = 'arrays', which is {data.type!r}; remove it"
            )


def bad_data(config: Config, world_size: int) -> Iterator[Problem]:
    """The two names of skipping bad data must not contradict each other."""
    data = config.data
    if data.skip_bad_documents != (data.on_bad_data == "skip"):
        yield Problem(
            ("data.on_bad_data", "data.skip_bad_documents"),
            f"data.on_bad_data = {data.on_bad_data!r} contradicts data.skip_bad_documents = {data.skip_bad_documents}; "
            "give data.on_bad_data alone",
        )


def xtuner_names(config: Config, world_size: int) -> Iterator[Problem]:
    """XTuner's name of a key must not contradict the key."""
    for theirs, ours in XTUNER_NAMES.items():
        given, value = getattr(config.data, theirs), getattr(config.data, ours)
        if given is not None and given != value:
            yield Problem(
                (f"data.{theirs}", f"data.{ours}"),
                f"data.{theirs} = {given!r} contradicts data.{ours} = {value!r}, of which it is XTuner's name; "
                "give one of them",
            )


def mocked(config: Config, world_size: int) -> Iterator[Problem]:
    """Recorded batches are replayed as they are, from a folder."""
    data = config.data
    if data.type != "mocked":
        return
    if data.train_folder is None:
        yield Problem(
            ("data.type", "data.train_folder"),
            "data.type = 'mocked' needs data.train_folder: the folder, or the common prefix, of recorded batches; to "
            "train on random tokens, remove data.type",
        )
    needed = {"rampup_batch_size": "", "fim": None, "min_length": 0, "min_length_dict": None, "on_bad_data": "stop"}
    for name, value in needed.items():
        if getattr(data, name) != value:
            yield Problem(
                (f"data.{name}", "data.type"),
                f"data.{name} = {getattr(data, name)!r}, but data.type = 'mocked' replays recorded batches as they "
                "are; remove it",
            )


def saving(config: Config, world_size: int) -> Iterator[Problem]:
    """Saving needs a folder and an interval."""
    ckpt = config.ckpt
    if not ckpt.enable_save_ckpt:
        return
    fix = "or set ckpt.enable_save_ckpt = False"
    if not ckpt.save_ckpt_folder:
        yield Problem(
            ("ckpt.save_ckpt_folder", "ckpt.enable_save_ckpt"),
            f"ckpt.save_ckpt_folder = {ckpt.save_ckpt_folder!r}: saving is on, so give a folder, {fix}",
        )
    if ckpt.checkpoint_every is None or ckpt.checkpoint_every <= 0:
        yield Problem(
            ("ckpt.checkpoint_every", "ckpt.enable_save_ckpt"),
            f"ckpt.checkpoint_every = {ckpt.checkpoint_every!r}: saving is on, so give a number above 0, {fix}",
        )
    if ckpt.oss_snapshot_freq is not None and ckpt.oss_snapshot_freq <= 0:
        yield Problem(
            ("ckpt.oss_snapshot_freq",),
            f"ckpt.oss_snapshot_freq = {ckpt.oss_snapshot_freq}: give a number above 0, or None for no snapshots",
        )
    if ckpt.snapshot_ckpt_folder is not None and ckpt.snapshot_ckpt_folder == ckpt.save_ckpt_folder:
        yield Problem(
            ("ckpt.snapshot_ckpt_folder", "ckpt.save_ckpt_folder"),
            f"ckpt.snapshot_ckpt_folder = {ckpt.snapshot_ckpt_folder!r} is also ckpt.save_ckpt_folder: the snapshots "
            "0 and 1 would be mistaken for steps; set another folder, or leave it out",
        )


def places(config: Config, world_size: int) -> Iterator[Problem]:
    """Checkpoint folders must be in a known storage, and the stop file on a local disk."""
    ckpt = config.ckpt
    folders = {
        "ckpt.save_ckpt_folder": ckpt.save_ckpt_folder,
        "ckpt.snapshot_ckpt_folder": ckpt.snapshot_ckpt_folder,
        "ckpt.load_ckpt_info.path": None if ckpt.load_ckpt_info is None else ckpt.load_ckpt_info.path,
        "ckpt.stop_file_path": ckpt.stop_file_path,
    }
    for key, folder in folders.items():
        if not folder:
            continue
        try:
            is_local = storage_path(folder).is_local
        except ConfigError as error:
            yield Problem((key,), f"{key} = {folder!r}: {error}")
            continue
        if key == "ckpt.stop_file_path" and not is_local:
            yield Problem((key,), f"{key} = {folder!r}: the stop file is read at every step; give a local path")


def model_changes(config: Config, world_size: int) -> Iterator[Problem]:
    """`allow_model_changes` may only name keys whose difference would otherwise be refused."""
    allowed = config.ckpt.allow_model_changes
    known = keys_that_change_outputs()
    for name in () if isinstance(allowed, bool) else allowed:
        if name not in known:
            yield Problem(
                ("ckpt.allow_model_changes",),
                f"ckpt.allow_model_changes names '{name}', which is not a key that changes the model's outputs, such "
                f"as 'model.rope_base'.{nearest(name, known)}",
            )


def batches(config: Config, world_size: int) -> Iterator[Problem]:
    """The texts of the data section must parse, and a data folder must not be empty."""
    data = config.data
    if data.train_folder == "":
        yield Problem(("data.train_folder",), "data.train_folder = '': give a folder, or None for random data")
    skip = data.skip_batches.replace(" ", "")
    ranges = [part.split("-") for part in skip.split(",")] if skip and _SKIP.fullmatch(skip) else []
    if skip and (not ranges or any(int(r[0]) > int(r[-1]) for r in ranges)):
        yield Problem(
            ("data.skip_batches",),
            f'data.skip_batches = {data.skip_batches!r}: expected steps and ranges of steps, such as "2-5,7"',
        )
    if data.rampup_batch_size.strip():
        ramp = parse_ramp(data.rampup_batch_size)
        if ramp is None or ramp[0] > data.micro_num:
            yield Problem(
                ("data.rampup_batch_size", "data.micro_num"),
                f'data.rampup_batch_size = {data.rampup_batch_size!r}: expected "start increment steps", three numbers '
                f"above 0, with start at most data.micro_num = {data.micro_num}",
            )


def parse_ramp(text: str) -> tuple[int, int, int] | None:
    """Start, increment and steps of data.rampup_batch_size, each above 0; None if the text is malformed."""
    if not _RAMP.fullmatch(text.strip()):
        return None
    start, increment, steps = map(int, text.split())
    return (start, increment, steps) if min(start, increment, steps) > 0 else None


def numerics(config: Config, world_size: int) -> Iterator[Problem]:
    """Schedules, dtypes, loss scaling, loaded parts and offloading must be consistent."""
    schedule = config.lr_scheduler
    if schedule.type == "wsd" and schedule.warmup_ratio + schedule.decay_ratio > 1:
        yield Problem(
            ("lr_scheduler.decay_ratio", "lr_scheduler.warmup_ratio"),
            f"lr_scheduler.decay_ratio = {schedule.decay_ratio} and warmup_ratio = {schedule.warmup_ratio} "
            "are together more than 1; lower one",
        )
    if config.model.dtype in ("torch.float32", "torch.tf32") and config.reduce_comm_dtype not in (
        None,
        "torch.float32",
    ):
        yield Problem(
            ("reduce_comm_dtype", "model.dtype"),
            f"reduce_comm_dtype = {config.reduce_comm_dtype!r}: gradients of model.dtype = {config.model.dtype!r} are "
            "reduced in torch.float32; leave it out",
        )
    if config.model.dtype == "torch.float64":
        for key, value, wanted in (
            ("reduce_comm_dtype", config.reduce_comm_dtype, None),
            ("adam.moments_dtype", config.adam.moments_dtype, "torch.float32"),
            ("hybrid_zero_optimizer.offload_optimizer", config.hybrid_zero_optimizer.offload_optimizer, False),
        ):
            if value != wanted:
                yield Problem(
                    (key, "model.dtype"),
                    f"{key} = {value!r}: with model.dtype = 'torch.float64', which is for comparisons, everything is "
                    "stored and reduced in float64 on the device of the weights; leave it out",
                )
    accumulation = config.hybrid_zero_optimizer.grad_accumulation_dtype
    if accumulation == "torch.bfloat16" and config.model.dtype != "torch.bfloat16":
        dtype, bits = {"torch.float16": ("fp16", "three"), "torch.float64": ("float64", "45")}.get(
            config.model.dtype, ("fp32", "sixteen")
        )
        yield Problem(
            ("hybrid_zero_optimizer.grad_accumulation_dtype", "model.dtype"),
            f"hybrid_zero_optimizer.grad_accumulation_dtype = {accumulation!r} is for model.dtype = 'torch.bfloat16': "
            f"gradients in {dtype} have {bits} bits more, which would be lost; leave it out",
        )
    scaler = config.grad_scaler
    low, high = scaler.scale_bounds
    if not low <= scaler.fp16.initial_scale <= high:
        yield Problem(
            ("grad_scaler.fp16.initial_scale", "grad_scaler.fp16.min_scale", "grad_scaler.max_scale"),
            f"grad_scaler.fp16.initial_scale = {scaler.fp16.initial_scale} must be between min_scale = "
            f"{scaler.fp16.min_scale} and max_scale = {scaler.max_scale}",
        )
    info = config.ckpt.load_ckpt_info
    if info is not None and info.ckpt_type in ("internlm_test", "internlm2_test"):
        yield Problem(
            ("ckpt.load_ckpt_info.ckpt_type",),
            f"ckpt.load_ckpt_info.ckpt_type = {info.ckpt_type!r}: convert a checkpoint of InternEvo first, "
            "whatever its layout: internlm convert from-internevo --ckpt DIR --out NEW; then path = NEW and ckpt_type "
            "= 'internevo'",
        )
    elif info is not None and info.ckpt_type != "internevo" and info.content != ("model",):
        yield Problem(
            ("ckpt.load_ckpt_info.content", "ckpt.load_ckpt_info.ckpt_type"),
            f"ckpt.load_ckpt_info.content = {info.content}: a checkpoint of type {info.ckpt_type!r} contains "
            "only weights; use ('model',)",
        )
    if config.cpu_offloading.num_layers > 0 and not config.cpu_offloading.enable:
        yield Problem(
            ("cpu_offloading.num_layers", "cpu_offloading.enable"),
            f"cpu_offloading.num_layers = {config.cpu_offloading.num_layers} needs cpu_offloading.enable = True",
        )
