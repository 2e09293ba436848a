"""Notices that depend on several keys: effects of a loaded config that its user may not expect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from internlm.config.capacity import capacity_notices, expert_capacity
from internlm.config.rules import expert_ranks
from internlm.config.rules.positions import exceeds_context
from internlm.config.schema import Config
from internlm.config.schema.base import is_path, walk_values

_INTERLEAVED = "parallel.sequence_2D.device_placement_strategy.interleaved"


def find_notices(config: Config, given: Callable[[str], Any], world_size: int) -> Iterator[str]:
    """One line each.

    Args:
        config: a valid config.
        given: path -> the value that the user gave for it, or None.
        world_size: number of ranks.
    """
    if isinstance(given("ckpt.load_ckpt_info"), dict) and config.ckpt.load_ckpt_info is None:
        yield "ckpt.load_ckpt_info has no path: nothing is loaded from it"
    ckpt = config.ckpt
    if ckpt.load_ckpt_info is not None and ckpt.load_ckpt_info.is_placeholder:
        path = ckpt.load_ckpt_info.path
        yield f"ckpt.load_ckpt_info.path = {path!r} is a placeholder: nothing is loaded, unless the folder exists"
    if not ckpt.enable_save_ckpt and ckpt.save_ckpt_folder and given("ckpt.auto_resume"):
        yield (
            f"no effect: ckpt.auto_resume = True (ckpt.enable_save_ckpt = False: {ckpt.save_ckpt_folder!r} is neither "
            "saved to nor resumed from; load from it by ckpt.load_ckpt_info)"
        )
    if ckpt.enable_save_ckpt and ckpt.async_upload and not ckpt.saves_in_background:
        yield (
            f"no effect: ckpt.async_upload = True (ckpt.save_ckpt_folder = {ckpt.save_ckpt_folder!r} is local; set "
            "ckpt.async_save = True to save in the background)"
        )
    if given(_INTERLEAVED) and not config.parallel.sequence_2D.device_placement_strategy.interleaved:
        yield f"{_INTERLEAVED} = True is ignored: the window is a whole node or the whole context"
    if config.data.valid_every > 0 and not config.data.has_valid_sets and not config.data.multiple_choice:
        yield (
            f"no effect: data.valid_every = {config.data.valid_every} (data.valid_folder is None: there is nothing to "
            "evaluate, where InternEvo takes random tokens)"
        )
    if config.data.valid_every == 0 and config.data.valid_folder is not None:
        yield (
            f"no effect: data.valid_folder = {config.data.valid_folder!r} (data.valid_every = 0 turns evaluation off: "
            "give the steps between evaluations)"
        )
    if config.data.valid_every == 0 and config.data.valid_fraction > 0:
        yield (
            f"data.valid_fraction = {config.data.valid_fraction} holds documents out of training, but data.valid_every "
            "= 0 turns evaluation off: give the steps between evaluations"
        )
    if config.model_type == "LLAVA" and not config.data.is_multimodal:
        yield (
            "model_type = 'LLAVA' with data.is_multimodal = False: no picture is read, so neither the vision tower nor "
            "the projector learns"
        )
    if config.reduce_comm_dtype == "torch.float16" and config.model.dtype == "torch.bfloat16":
        yield (
            "reduce_comm_dtype = 'torch.float16' with model.dtype = 'torch.bfloat16': there is no loss scale, so "
            "elements of gradients below 3e-8 become 0 in communication, those below 6e-5 lose digits, and a sum above "
            "65,504 skips the update; 'torch.bfloat16' takes as many bytes and has the range of fp32"
        )
    for key, field, value in walk_values(config):
        if is_path(field) and isinstance(value, str) and "$" in value:
            yield f"{key} = {value!r}: '$' is part of the name; for a variable write os.environ[...] in the config"
    yield from _values(config)
    yield from _experts(config, given, world_size)
    yield from _multi_token(config)
    yield from _attention_sinks(config)
    yield from _recomputation(config, given)
    yield from _pipeline(config, given)
    yield from _shards(config)
    yield from _context(config)


def _values(config: Config) -> Iterator[str]:
    schedule, data, model = config.lr_scheduler, config.data, config.model
    if exceeds_context(config):
        yield (
            f"data.seq_len = {data.seq_len} is longer than model.max_position_embeddings = "
            f"{model.max_position_embeddings}, as in InternEvo, which does not compare them: training goes on, for "
            "without scaling the latter changes no position. An export names it as the model's length: set it to the "
            "length that the model is meant for"
        )
    if schedule.eta_min > config.adam.lr and schedule.type != "constant":
        yield (
            f"lr_scheduler.eta_min = {schedule.eta_min} is above adam.lr = {config.adam.lr}: after the warm-up the "
            "learning rate rises"
        )
    if data.pack_sample_into_one and not data.use_packed_dataset:
        yield "no effect: data.pack_sample_into_one = True (data.use_packed_dataset = False: nothing is packed)"


_SIGMOID_FAMILIES = ("DEEPSEEK_V3", "KIMI_K2", "GLM4_MOE")


def _attention_sinks(config: Config) -> Iterator[str]:
    if config.model_type == "GPT_OSS":
        yield (
            "model_type = 'GPT_OSS': attention sinks have no fused kernel on GPUs, and none for windows on CPUs; the "
            "memory of attention there grows with the square of the longest document"
        )


def _why_cut(config: Config, world_size: int) -> str | None:
    """Why layers with experts are not compiled whole; None if they are."""
    model, tensor, keys = config.model, config.parallel.tensor, config.model.moe_layer_kwargs
    second_is_random = model.moe_type == "GShard" and model.top_k == 2 and not keys.use_fused_gating
    reasons = {
        "ranks exchange the rows of experts": expert_ranks(config, world_size) > 1,
        "linear layers communicate": tensor.size > 1 or tensor.mode == "isp",
        "context ranks exchange keys and values": config.parallel.context_ranks > 1,
        "the number of rows follows from the capacity of experts": expert_capacity(model) is not None,
        "experts run their GEMMs in float8": config.float8.enable_float8_linear,
        "the choice of experts has noise": keys.noisy_gate_policy in ("Jitter", "RSample") or second_is_random,
        "attention sinks are not compiled": config.model_type == "GPT_OSS",
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _experts(config: Config, given: Callable[[str], Any], world_size: int) -> Iterator[str]:
    model, size = config.model, config.parallel.expert.size
    if model.num_experts <= 1:
        return
    if size <= 0 and world_size > 1:
        yield (
            f"parallel.expert.size = {size}: the {model.num_experts} experts of a layer are dealt to "
            f"{expert_ranks(config, world_size)} of {world_size} rank(s)"
        )
    yield from _split_experts(config, given, world_size)
    unused = [f"model.{key}" for key in ("intermediate_size", "mlp_ratio") if given(f"model.{key}") is not None]
    if model.moe_intermediate_size and not model.dense_layers and unused:
        yield (
            f"no effect: {', '.join(unused)} (no layer is dense, and the width of experts is "
            f"model.moe_intermediate_size = {model.moe_intermediate_size})"
        )
    yield from capacity_notices(config, given)
    reason = _why_cut(config, world_size) if model.compile else None
    if reason is not None:
        yield f"model.compile = True: routers and routed experts are not compiled, the rest of a layer is ({reason})"
    if model.top_k == 1 and model.moe_layer_kwargs.normalize_expert_weights:
        yield (
            "model.top_k = 1 with model.moe_layer_kwargs.normalize_expert_weights: every weight is 1, so the cross "
            "entropy does not train the routers; set it to False"
        )
    if config.model_type in _SIGMOID_FAMILIES and model.moe_layer_kwargs.scoring_func != "sigmoid":
        yield (
            f"model_type = {config.model_type!r} with model.moe_layer_kwargs.scoring_func = "
            f"{model.moe_layer_kwargs.scoring_func!r}: published models have 'sigmoid', and selection_bias = True"
        )
    if config.model_type == "DEEPSEEK_V2" and model.moe_layer_kwargs.normalize_expert_weights:
        yield (
            "model_type = 'DEEPSEEK_V2' with model.moe_layer_kwargs.normalize_expert_weights = True: published models "
            "have False, and transformers has no class for such a model, so that it cannot be exported"
        )
    has_bias, rate = model.moe_layer_kwargs.selection_bias, config.loss.moe_bias_update_rate
    if has_bias and rate == 0:
        yield (
            "model.moe_layer_kwargs.selection_bias = True with loss.moe_bias_update_rate = 0: the biases stay as they "
            "are loaded, and 0 in a new model"
        )
    if config.moe.replay.read is not None:
        yield (
            f"moe.replay.read = {config.moe.replay.read!r}: training takes the experts of every token from these "
            "files, and ignores the routers' own choice; validation is not replayed"
        )
    if config.loss.moe_loss_coeff == 0 and not (has_bias and rate):
        yield (
            "loss.moe_loss_coeff = 0: nothing balances the load of the experts; moe/max_load in the metrics shows how "
            "uneven it gets"
        )


def _split_experts(config: Config, given: Callable[[str], Any], world_size: int) -> Iterator[str]:
    """Keys of the layout of experts that another key makes useless."""
    parallel = config.parallel
    if given("parallel.expert.no_tp") is False:
        if parallel.tensor.mode == "isp":
            yield (
                "no effect: parallel.expert.no_tp = False (parallel.tensor.mode = 'isp': tensor ranks split sequences; "
                "parallel.expert_weight.size splits the weights of experts)"
            )
        elif parallel.tensor.size == 1:
            yield "no effect: parallel.expert.no_tp = False (parallel.tensor.size = 1)"
    state = given("parallel.expert_zero1.size")
    if state is not None and state > 0 and expert_ranks(config, world_size) * parallel.expert_weight.size == 1:
        yield (
            f"no effect: parallel.expert_zero1.size = {state} (all experts of a layer are on each rank, so "
            "parallel.zero1.size is for them too)"
        )


def _multi_token(config: Config) -> Iterator[str]:
    model = config.model
    key = f"model.num_nextn_predict_layers = {model.num_nextn_predict_layers}"
    if model.num_nextn_predict_layers == 0:
        return
    if config.float8.enable_float8_linear:
        yield f"{key}: with float8.enable_float8_linear = True, these layers compute in {model.dtype}"
    if config.loss.multi_token_loss_coeff == 0:
        yield f"{key} with loss.multi_token_loss_coeff = 0: these layers are not trained"


def _recomputation(config: Config, given: Callable[[str], Any]) -> Iterator[str]:
    model, offloading = config.model, config.cpu_offloading
    keys = ("model.checkpoint_save_policy", "selective_checkpoint", "selective_checkpoint_offload")
    requested = [f"{key} = {given(key)!r}" for key in keys if given(key)]
    if requested and model.num_recomputed == 0:
        share = f"model.checkpoint = {model.checkpoint}"
        yield f"no effect: {', '.join(requested)} (no layer is recomputed: {share}; set it to 1 for all layers)"
    if offloading.enable and offloading.num_layers == 0:
        yield "no effect: cpu_offloading.enable = True (cpu_offloading.num_layers = 0: give the number of layers)"


def _pipeline(config: Config, given: Callable[[str], Any]) -> Iterator[str]:
    pipeline, data = config.parallel.pipeline, config.data
    chunks = given("model.num_chunks")
    if chunks not in (None, config.model.num_chunks):
        why = "there is no pipeline" if pipeline.size == 1 else f"a stage of {pipeline.mode} has 2 chunks"
        yield f"model.num_chunks = {chunks} is ignored: {why}"
    if pipeline.size == 1:
        return
    if data.gradient_accumulation != data.micro_num:
        yield (
            f"data.gradient_accumulation = {data.gradient_accumulation} is ignored: a pipeline accumulates all "
            f"data.micro_num = {data.micro_num} micro-batches"
        )
    if pipeline.mode in ("ZBV", "DUALPIPEV") and data.micro_num < 2 * pipeline.size:
        yield (
            f"data.micro_num = {data.micro_num}: {pipeline.mode} keeps its stages busy with 2 * parallel.pipeline.size "
            f"= {2 * pipeline.size} micro-batches or more"
        )


def _shards(config: Config) -> Iterator[str]:
    parallel, model = config.parallel, config.model
    is_isp = parallel.tensor.mode == "isp"
    name, size = ("weight", parallel.weight.size) if is_isp else ("tensor", parallel.tensor.size)
    if model.vocab_size % size:
        yield (
            f"model.vocab_size = {model.vocab_size} is not divisible by parallel.{name}.size = {size}: the last shards "
            "are padded with unused rows"
        )
    if not is_isp and model.embed_split_hidden and model.hidden_size % size:
        yield (
            f"model.embed_split_hidden = True is ignored: model.hidden_size = {model.hidden_size} is not divisible by "
            f"parallel.tensor.size = {size}, so the vocabulary of the embedding is split"
        )
    if parallel.uses_fsdp and parallel.zero1.size == 1:
        yield "parallel.zero1.size = 1: FSDP shards weights over these ranks, so they are not sharded; set it to -1"


def _context(config: Config) -> Iterator[str]:
    context = config.parallel.context
    keys = [f"parallel.context.{name} = {getattr(context, name)!r}" for name in ("cut", "exchange")]
    unused = [key for key in keys if not key.endswith("'auto'")]
    if unused and config.parallel.context_ranks == 1:
        yield f"no effect: {', '.join(unused)} (there is one context rank)"
    if config.parallel.context_ranks == 1:
        return
    parallel, tokens = config.parallel, config.data.packed_length
    ranks = parallel.context_ranks * parallel.tensor_ranks
    if tokens % ranks:
        yield (
            f"each sample of {tokens} tokens (data.micro_bsz * data.seq_len) is filled up with {-tokens % ranks} of "
            f"padding, as {ranks} ranks share it: a multiple of {ranks} wastes nothing"
        )
    if config.model.kv_lora_rank is not None:
        yield from _context_of_latents(config)


def _context_of_latents(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.tensor.mode == "isp" and parallel.tensor_ranks > 1:
        yield (
            f"latent attention with {parallel.tensor_ranks} sequence ranks of isp and {parallel.context_ranks} context "
            "ranks: keys and values of all heads travel, for heads are exchanged first; without sequence ranks, or in "
            "another mode, only latent vectors do"
        )
        return
    section = "sequence_2D" if parallel.sequence_2D.enable else "context"
    unused = []
    if parallel.context.exchange not in ("auto", "direct"):
        unused.append(f"parallel.context.exchange = {parallel.context.exchange!r}")
    if parallel.context_window > 1:
        unused.append(f"parallel.{section}.window_size = {parallel.context_window}")
    if unused:
        yield f"no effect: {', '.join(unused)} (latent vectors travel straight from the rank of a token, in one step)"
