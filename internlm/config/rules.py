"""What must hold between keys. Every check runs before a process group exists, and all mistakes are reported together.

The numbers are those of InternEvo's 24 groups of checks. Groups 1, 2, 4, 7, 8 and 12 are the loader's and the schema's
own types; 13 concerns accelerators that this project does not have. The last group is ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from internlm.config.mistakes import Mistake
from internlm.config.schema import Config

Rule = Callable[[Config, int], Iterator[Mistake]]


def find_mistakes(config: Config, world_size: int) -> Iterator[Mistake]:
    """Every mistake between the keys of a config that is to run on `world_size` ranks."""
    for rule in RULES:
        yield from rule(config, world_size)


def _fsdp(config: Config, world_size: int) -> Iterator[Mistake]:
    """3, 10: FSDP goes with neither a pipeline nor isp."""
    parallel = config.parallel
    if not parallel.uses_fsdp:
        return
    fsdp = "parallel.fsdp.enable" if parallel.fsdp.enable else "parallel.zero1.fsdp"
    if parallel.pipeline.size > 1:
        size = parallel.pipeline.size
        yield Mistake(
            (fsdp, "parallel.pipeline.size"),
            f"{fsdp} = True does not go with parallel.pipeline.size = {size}; set one of them to its default",
        )
    if parallel.tensor.mode == "isp":
        yield Mistake(
            (fsdp, "parallel.tensor.mode"), f"{fsdp} = True does not go with parallel.tensor.mode = 'isp'; turn it off"
        )


def _accumulation(config: Config, world_size: int) -> Iterator[Mistake]:
    """5: without a pipeline, accumulation is the number of micro-batches."""
    data = config.data
    if config.parallel.pipeline.size == 1 and data.gradient_accumulation != data.micro_num:
        yield Mistake(
            ("data.gradient_accumulation", "data.micro_num"),
            f"data.gradient_accumulation = {data.gradient_accumulation} must equal data.micro_num = {data.micro_num}; "
            "leave it out",
        )


def _saving(config: Config, world_size: int) -> Iterator[Mistake]:
    """6: saving needs a folder and an interval."""
    ckpt = config.ckpt
    if not ckpt.enable_save_ckpt:
        return
    fix = "or set ckpt.enable_save_ckpt = False"
    if not ckpt.save_ckpt_folder:
        yield Mistake(
            ("ckpt.save_ckpt_folder", "ckpt.enable_save_ckpt"),
            f"ckpt.save_ckpt_folder = {ckpt.save_ckpt_folder!r}: saving is on, so give a folder, {fix}",
        )
    if ckpt.checkpoint_every is None or ckpt.checkpoint_every <= 0:
        yield Mistake(
            ("ckpt.checkpoint_every", "ckpt.enable_save_ckpt"),
            f"ckpt.checkpoint_every = {ckpt.checkpoint_every!r}: saving is on, so give a number above 0, {fix}",
        )


def _interleaving_of_heads(config: Config, world_size: int) -> Iterator[Mistake]:
    """9: adapt_hf is the opposite of qk_interleaved."""
    model = config.model
    if model.adapt_hf is not None and model.adapt_hf == model.qk_interleaved:
        yield Mistake(
            ("model.adapt_hf", "model.qk_interleaved"),
            f"model.adapt_hf = {model.adapt_hf} contradicts model.qk_interleaved = {model.qk_interleaved}; "
            "it is the opposite: leave adapt_hf out",
        )


def _vocabulary(config: Config, world_size: int) -> Iterator[Mistake]:
    """11: the vocabulary is split evenly."""
    vocab = config.model.vocab_size
    sizes = {
        "parallel.weight.size": config.parallel.weight.size,
        "parallel.tensor.size": config.parallel.tensor.size,
    }
    for path, size in sizes.items():
        if vocab % size:
            padded = -(-vocab // size) * size
            yield Mistake(
                ("model.vocab_size", path),
                f"model.vocab_size = {vocab} is not divisible by {path} = {size}; pad the vocabulary to {padded}",
            )


def _weight_parallel(config: Config, world_size: int) -> Iterator[Mistake]:
    """14: weight parallelism is part of isp."""
    size, mode = config.parallel.weight.size, config.parallel.tensor.mode
    if size > 1 and mode != "isp":
        yield Mistake(
            ("parallel.weight.size", "parallel.tensor.mode"),
            f"parallel.weight.size = {size} needs parallel.tensor.mode = 'isp', which is {mode!r}; "
            "set the mode to 'isp' or the size to 1",
        )


def _pipeline(config: Config, world_size: int) -> Iterator[Mistake]:
    """16 to 18: what each pipeline schedule needs. For 15 there is no need: messages always travel beside the work."""
    pipeline, chunks, micro_num = config.parallel.pipeline, config.model.num_chunks, config.data.micro_num
    stages, size_key = pipeline.size, "parallel.pipeline.size"
    if stages == 1:
        return
    if pipeline.mode == "ZBV" and micro_num < 2 * stages:
        yield Mistake(
            ("data.micro_num", size_key),
            f"data.micro_num = {micro_num}: ZBV needs at least 2 * {size_key} = {2 * stages} micro-batches",
        )
    if pipeline.mode == "ZBH1":
        if config.hybrid_zero_optimizer.overlap_sync_grad:
            yield Mistake(
                ("hybrid_zero_optimizer.overlap_sync_grad", "parallel.pipeline.mode"),
                "hybrid_zero_optimizer.overlap_sync_grad = True does not go with parallel.pipeline.mode = 'ZBH1'; "
                "set it to False",
            )
        if chunks > 1:
            yield Mistake(
                ("model.num_chunks", "parallel.pipeline.mode"),
                f"model.num_chunks = {chunks} does not go with parallel.pipeline.mode = 'ZBH1'; set it to 1",
            )
        if config.parallel.tensor.mode == "isp" and config.parallel.weight.overlap:
            yield Mistake(
                ("parallel.weight.overlap", "parallel.pipeline.mode"),
                "parallel.weight.overlap = True does not go with parallel.pipeline.mode = 'ZBH1'; set it to False",
            )
    if pipeline.mode == "1F1B" and chunks > 1 and micro_num % stages:
        yield Mistake(
            ("data.micro_num", size_key, "model.num_chunks"),
            f"data.micro_num = {micro_num} is not divisible by {size_key} = {stages}, "
            f"which the interleaved schedule (model.num_chunks = {chunks}) needs",
        )


def _selective_checkpoint(config: Config, world_size: int) -> Iterator[Mistake]:
    """19: selective recomputation is part of isp; offloading is part of it."""
    mode, before = config.parallel.tensor.mode, config.parallel.weight.launch_allgather_before
    if config.selective_checkpoint and mode != "isp":
        yield Mistake(
            ("selective_checkpoint", "parallel.tensor.mode"),
            f"selective_checkpoint = True needs parallel.tensor.mode = 'isp', which is {mode!r}",
        )
    if config.selective_checkpoint_offload and not (config.selective_checkpoint and before == "wo"):
        yield Mistake(
            (
                "selective_checkpoint_offload",
                "selective_checkpoint",
                "parallel.weight.launch_allgather_before",
            ),
            "selective_checkpoint_offload = True needs selective_checkpoint = True (is "
            f"{config.selective_checkpoint}) and parallel.weight.launch_allgather_before = 'wo' (is {before!r})",
        )


def _experts(config: Config, world_size: int) -> Iterator[Mistake]:
    """20, 23: what experts need, and that dense models have none."""
    parallel, experts = config.parallel, config.model.num_experts
    if experts <= 1:
        for path, size in (
            ("parallel.expert.size", parallel.expert.size),
            ("parallel.expert_weight.size", parallel.expert_weight.size),
        ):
            if size > 1:
                yield Mistake(
                    (path, "model.num_experts"),
                    f"{path} = {size}: the model is dense (model.num_experts = {experts}); set it to 1",
                )
        return
    if parallel.uses_fsdp:
        yield Mistake(
            ("model.num_experts", "parallel.fsdp.enable", "parallel.zero1.fsdp"),
            f"model.num_experts = {experts} does not go with FSDP; turn FSDP off",
        )
    zero = config.hybrid_zero_optimizer
    if zero.overlap_sync_grad and zero.overlap_sync_param:
        yield Mistake(
            ("hybrid_zero_optimizer.overlap_sync_param", "hybrid_zero_optimizer.overlap_sync_grad"),
            "hybrid_zero_optimizer.overlap_sync_param and overlap_sync_grad may not both be True with "
            f"model.num_experts = {experts}; set one to False",
        )
    if parallel.expert_weight.size > 1 and parallel.tensor.mode != "isp":
        yield Mistake(
            ("parallel.expert_weight.size", "parallel.tensor.mode"),
            f"parallel.expert_weight.size = {parallel.expert_weight.size} needs parallel.tensor.mode = 'isp'",
        )
    data = data_ranks(config, world_size)
    if data is None:
        return
    if parallel.zero1.size > 0 and parallel.zero1.size != data:
        yield Mistake(
            ("parallel.zero1.size", "model.num_experts"),
            f"parallel.zero1.size = {parallel.zero1.size}: with experts it must be -1 or all {data} data ranks",
        )
    expert = parallel.expert.size
    if expert > 0 and experts % expert:
        yield Mistake(
            ("model.num_experts", "parallel.expert.size"),
            f"model.num_experts = {experts} is not divisible by parallel.expert.size = {expert}",
        )
    if data % experts and experts % data:
        yield Mistake(
            ("model.num_experts",),
            f"model.num_experts = {experts} and the {data} data ranks: one must divide the other",
        )


def _sequence_2d(config: Config, world_size: int) -> Iterator[Mistake]:
    """21: heads times context is the sequence group; placement."""
    two, tensor = config.parallel.sequence_2D, config.parallel.tensor.size
    if not two.enable:
        return
    path = "parallel.sequence_2D"
    if two.head_size * two.context_size != tensor:
        yield Mistake(
            (f"{path}.head_size", f"{path}.context_size", "parallel.tensor.size"),
            f"{path}.head_size = {two.head_size} times context_size = {two.context_size} must be "
            f"parallel.tensor.size = {tensor}",
        )
    if two.context_size % two.window_size:
        yield Mistake(
            (f"{path}.window_size", f"{path}.context_size"),
            f"{path}.window_size = {two.window_size} does not divide context_size = {two.context_size}",
        )
    placement = two.device_placement_strategy
    if placement.head_first and two.head_size > 1 and placement.interleaved:
        yield Mistake(
            (f"{path}.device_placement_strategy.interleaved",),
            f"{path}.device_placement_strategy.interleaved = True does not go with head_first = True and "
            f"head_size = {two.head_size}; set it to False",
        )
    if config.data.use_packed_dataset:
        yield Mistake(
            ("data.use_packed_dataset", f"{path}.enable"),
            f"data.use_packed_dataset = True: {path} works on rows of one length; set it to False",
        )


def _zero(config: Config, world_size: int) -> Iterator[Mistake]:
    """22: the optimizer's state is split over a divisor of the ranks that hold the same weights."""
    size, ranks = config.parallel.zero1.size, weight_data_ranks(config, world_size)
    if size > 0 and ranks is not None and ranks % size:
        allowed = ", ".join(str(d) for d in range(1, ranks + 1) if ranks % d == 0)
        yield Mistake(
            ("parallel.zero1.size",),
            f"parallel.zero1.size = {size} does not divide the {ranks} data-parallel ranks (world size {world_size}); "
            f"use -1 (all of them) or one of {allowed}",
        )


def _world(config: Config, world_size: int) -> Iterator[Mistake]:
    """24: every view of the ranks covers all of them."""
    parallel = config.parallel
    views = [("parallel.tensor.size", parallel.tensor.size)]
    if parallel.tensor.mode == "isp":
        views.append(("parallel.weight.size", parallel.weight.size))
    for path, size in views:
        if world_size % (size * parallel.pipeline.size):
            yield Mistake(
                (path, "parallel.pipeline.size"),
                f"{path} = {size} times parallel.pipeline.size = {parallel.pipeline.size} does not divide the "
                f"world size {world_size}; start a multiple of {size * parallel.pipeline.size} ranks",
            )
    expert, data = parallel.expert.size, data_ranks(config, world_size)
    if config.model.num_experts > 1 and expert > 0 and data is not None:
        expert_weight = parallel.expert_weight.size if parallel.tensor.mode == "isp" else 1
        spread = data * (parallel.tensor.size if parallel.expert.no_tp or parallel.tensor.mode == "isp" else 1)
        if spread % (expert * expert_weight):
            yield Mistake(
                ("parallel.expert.size", "parallel.expert_weight.size"),
                f"parallel.expert.size = {expert} times parallel.expert_weight.size = {expert_weight} does not divide "
                f"the {spread} ranks that experts are spread over",
            )


def data_ranks(config: Config, world_size: int) -> int | None:
    """Ranks with different data, or None when the sizes do not divide the world."""
    return _quotient(world_size, config.parallel.tensor.size * config.parallel.pipeline.size)


def weight_data_ranks(config: Config, world_size: int) -> int | None:
    """Ranks that hold the same weights: for isp the weight view counts, else these are the data ranks."""
    parallel = config.parallel
    if parallel.tensor.mode != "isp":
        return data_ranks(config, world_size)
    return _quotient(world_size, parallel.weight.size * parallel.pipeline.size)


def _quotient(whole: int, part: int) -> int | None:
    return None if whole % part else whole // part


_SKIP = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_RAMP = re.compile(r"\d+ +\d+ +\d+")


def _data(config: Config, world_size: int) -> Iterator[Mistake]:
    """Ours: the little languages of the data section, and packing."""
    data = config.data
    skip = data.skip_batches.replace(" ", "")
    ranges = [part.split("-") for part in skip.split(",")] if skip and _SKIP.fullmatch(skip) else []
    if skip and (not ranges or any(int(r[0]) > int(r[-1]) for r in ranges)):
        yield Mistake(
            ("data.skip_batches",),
            f'data.skip_batches = {data.skip_batches!r}: expected steps and ranges of steps, such as "2-5,7"',
        )
    ramp = data.rampup_batch_size.strip()
    if ramp:
        numbers = [int(n) for n in ramp.split()] if _RAMP.fullmatch(ramp) else [0]
        if min(numbers) < 1 or numbers[0] > data.micro_num:
            yield Mistake(
                ("data.rampup_batch_size", "data.micro_num"),
                f'data.rampup_batch_size = {data.rampup_batch_size!r}: expected "start increment steps", three numbers '
                f"above 0, with start at most data.micro_num = {data.micro_num}",
            )
    if data.pack_sample_into_one and not data.use_packed_dataset:
        yield Mistake(
            ("data.pack_sample_into_one", "data.use_packed_dataset"),
            "data.pack_sample_into_one = True needs data.use_packed_dataset = True",
        )


def _shape(config: Config, world_size: int) -> Iterator[Mistake]:
    """Ours: heads fit the width, windows and scaled positions are complete."""
    model = config.model
    heads, kv_heads = model.num_attention_heads, model.num_kv_attention_heads
    if model.head_dim is None and model.hidden_size % heads:
        yield Mistake(
            ("model.hidden_size", "model.num_attention_heads"),
            f"model.hidden_size = {model.hidden_size} is not divisible by model.num_attention_heads = {heads}; "
            "change one of them or give model.head_dim",
        )
    if kv_heads is not None and heads % kv_heads:
        yield Mistake(
            ("model.num_kv_attention_heads", "model.num_attention_heads"),
            f"model.num_kv_attention_heads = {kv_heads} does not divide model.num_attention_heads = {heads}",
        )
    if model.use_sliding_window and model.sliding_window is None:
        yield Mistake(
            ("model.sliding_window", "model.use_sliding_window"),
            "model.sliding_window = None: give its length in tokens, or set model.use_sliding_window = False",
        )
    if model.use_dynamic_ntk_rope and model.rope_scaling is not None:
        yield Mistake(
            ("model.use_dynamic_ntk_rope", "model.rope_scaling"),
            "model.use_dynamic_ntk_rope = True and model.rope_scaling are two scalings of positions; keep one",
        )
    if model.no_bias:
        for name in ("qkv_bias", "o_bias", "mlp_bias"):
            if getattr(model, name):
                yield Mistake(
                    (f"model.{name}", "model.no_bias"),
                    f"model.{name} = True contradicts no_bias = True; keep one",
                )


def _numerics(config: Config, world_size: int) -> Iterator[Mistake]:
    """Ours: schedules, gradient format and what may be loaded."""
    schedule, adam = config.lr_scheduler, config.adam
    if schedule.eta_min > adam.lr:
        yield Mistake(
            ("lr_scheduler.eta_min", "adam.lr"),
            f"lr_scheduler.eta_min = {schedule.eta_min} is above adam.lr = {adam.lr}: the rate would grow; lower it",
        )
    if schedule.type == "wsd" and schedule.warmup_ratio + schedule.decay_ratio > 1:
        yield Mistake(
            ("lr_scheduler.decay_ratio", "lr_scheduler.warmup_ratio"),
            f"lr_scheduler.decay_ratio = {schedule.decay_ratio} and warmup_ratio = {schedule.warmup_ratio} "
            "are together more than 1; lower one",
        )
    if config.model.dtype in ("torch.float32", "torch.tf32") and config.reduce_comm_dtype not in (
        None,
        "torch.float32",
    ):
        yield Mistake(
            ("reduce_comm_dtype", "model.dtype"),
            f"reduce_comm_dtype = {config.reduce_comm_dtype!r}: gradients of model.dtype = {config.model.dtype!r} are "
            "reduced in torch.float32; leave it out",
        )
    scaler = config.grad_scaler
    if not scaler.fp16.min_scale <= scaler.fp16.initial_scale <= scaler.max_scale:
        yield Mistake(
            ("grad_scaler.fp16.initial_scale", "grad_scaler.fp16.min_scale", "grad_scaler.max_scale"),
            f"grad_scaler.fp16.initial_scale = {scaler.fp16.initial_scale} must lie between min_scale = "
            f"{scaler.fp16.min_scale} and max_scale = {scaler.max_scale}",
        )
    info = config.ckpt.load_ckpt_info
    if info is not None and info.ckpt_type != "internevo" and info.content != ("model",):
        yield Mistake(
            ("ckpt.load_ckpt_info.content", "ckpt.load_ckpt_info.ckpt_type"),
            f"ckpt.load_ckpt_info.content = {info.content}: a checkpoint of type {info.ckpt_type!r} holds weights "
            "only; use ('model',)",
        )
    if config.cpu_offloading.num_layers > 0 and not config.cpu_offloading.enable:
        yield Mistake(
            ("cpu_offloading.num_layers", "cpu_offloading.enable"),
            f"cpu_offloading.num_layers = {config.cpu_offloading.num_layers} needs cpu_offloading.enable = True",
        )


RULES: tuple[Rule, ...] = (
    _fsdp,
    _accumulation,
    _saving,
    _interleaving_of_heads,
    _vocabulary,
    _weight_parallel,
    _pipeline,
    _selective_checkpoint,
    _experts,
    _sequence_2d,
    _zero,
    _world,
    _data,
    _shape,
    _numerics,
)
