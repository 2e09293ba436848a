"""A run to be compared: a config, the number of ranks, and the composition of its batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from internlm.config.rules import find_problems
from internlm.config.schema import Config
from internlm.config.validation import build_config
from internlm.initialize.build import build_layout
from internlm.utils.errors import ConfigError
from internlm.verify.choices import (
    FLOAT8_LATENT_KEYS,
    LATENT_FAMILIES,
    LATENT_KEYS,
    PARAMETER_GROUPS,
    ROUTERS,
    SELECTIONS,
    BatchChoices,
    LayoutChoices,
    ModelChoices,
    StepChoices,
    from_text,
    to_text,
)
from internlm.verify.vision import vision_keys

# A step of AdamW is lr * m / (sqrt(v) + eps). With the usual eps of 1e-8 an element whose exact gradient is 0 moves by
# lr in the direction of its rounding error, so two correct runs diverge. With an eps as large as the gradients the
# update is a smooth function of them, and a difference in weights implies a difference in gradients. The learning rate
# moves weights of 0.02 by a few percent per step: enough to be measured, but not so much that the rounding of one step
# changes the model of the next.
LEARNING_RATE = 1e-3
ADAM_EPSILON = 1e-3

HEAD_DIM = 8
SEQ_LEN = 16
MICRO_BSZ = 2
WINDOW = 5

# Float8 GEMMs run in tiles of 16: channels of a head, and tokens of a sequence for each tensor rank.
FLOAT8_HEAD_DIM = 16
FLOAT8_SEQ_LEN = 16 // MICRO_BSZ

FLOAT8_KEYS: Mapping[str, Any] = {
    "float8.enable_float8_linear": True,
    "float8.first_and_last_layer": True,
    "model.dtype": "torch.float64",
}
"""Float8 GEMMs in every layer, with everything else in float64. Another order of additions changes the float8 rounding
of a number with a probability of about its own rounding error. That is 1e-16 in float64. With the 1e-7 of fp32, some of
the 1e5 rounded numbers would differ, each by 6 %."""

ROUTER_LOSSES: Mapping[str, float] = {"loss.moe_loss_coeff": 0.1, "loss.moe_z_loss_coeff": 0.02}
"""Coefficients with which the losses of a router have a large part of its gradient. The cross entropy hardly has one:
the outputs of new experts are small."""

SEQUENCE_LOSS: Mapping[str, float] = {"loss.moe_sequence_loss_coeff": 0.05}
"""That of routers with sigmoid scores."""

BIAS_RULE: Mapping[str, Any] = {"loss.moe_bias_update_rate": 0.02, "loss.moe_bias_centered": True}
"""A rate at which the bias of one step changes many choices of the next. Centered changes have more digits."""


@dataclass(frozen=True)
class Case:
    """A run for verification.

    Attributes:
        config: checked or not; `model`, `parallel`, `data` (sizes), `adam` and `hybrid_zero_optimizer` are used.
        world_size: number of ranks.
        documents: composition of its batches.
    """

    config: Config
    world_size: int = 1
    documents: BatchChoices = field(default_factory=BatchChoices)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per step, over all data ranks."""
        return self.config.data.micro_num * build_layout(self.config, self.world_size).data_size

    def reference(self) -> Case:
        """The same run in one process: same model and global batches, without offloading."""
        keys = {"hybrid_zero_optimizer.offload_optimizer": False}
        config = changed(self.config, {**LayoutChoices().keys(), **_micro_num(self.num_micro_batches), **keys})
        return replace(self, config=config, world_size=1)

    @property
    def needs_replay(self) -> bool:
        """Whether rounding may change the experts of a token, so that only runs with equal routing are comparable."""
        return self.config.model.num_experts > 1 and self.config.model.torch_dtype != torch.float64

    def with_routing(self, folder: Path, *, write: bool = False) -> Case:
        """The same run, with routing that is read from a folder, or written to it."""
        return replace(self, config=changed(self.config, {f"moe.replay.{'write' if write else 'read'}": str(folder)}))

    @property
    def fingerprint(self) -> str:
        """A hash that is equal for two cases of the same run."""
        text = f"{self.config.model_dump_json()} {self.world_size} {self.documents}"
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Combination:
    """One point in the space of layouts, models, batches and optimizer settings."""

    ranks: int = 1
    layout: LayoutChoices = field(default_factory=LayoutChoices)
    model: ModelChoices = field(default_factory=ModelChoices)
    documents: BatchChoices = field(default_factory=BatchChoices)
    stepping: StepChoices = field(default_factory=StepChoices)

    def __str__(self) -> str:
        """One line of text, the inverse of `parse`."""
        parts = {"layout": self.layout, "model": self.model, "documents": self.documents, "stepping": self.stepping}
        texts = [f"ranks={self.ranks}", *(f"{name}:{to_text(part)}" for name, part in parts.items() if to_text(part))]
        return " ".join(texts)

    @classmethod
    def parse(cls, text: str) -> Combination:
        """Parse the text of `str(combination)`; a part may be given in several words.

        Raises:
            ConfigError: the text has another form.
        """
        classes: dict[str, type] = {
            "layout": LayoutChoices,
            "model": ModelChoices,
            "documents": BatchChoices,
            "stepping": StepChoices,
        }
        ranks, *words = text.split() or [""]
        texts: dict[str, str] = {}
        for word in words:
            name, _, choices = word.partition(":")
            if name not in classes:
                raise ConfigError(f"'{word}': expected one of {', '.join(f'{known}:...' for known in classes)}")
            texts[name] = f"{texts.get(name, '')},{choices}"
        parts: dict[str, Any] = {name: from_text(classes[name], choices) for name, choices in texts.items()}
        number = ranks.removeprefix("ranks=")
        if not number.isdigit():
            raise ConfigError(f"'{ranks}': expected ranks=N")
        return cls(int(number), **parts)

    def problems(self) -> list[str]:
        """Why a config with these choices would be refused; empty if it is valid."""
        try:
            case = self.case()
            build_layout(case.config, self.ranks)
        except ConfigError as error:
            return error.mistakes
        found = [problem.text for problem in find_problems(case.config, self.ranks)]
        if self.layout.weight > 1 and self.layout.mode != "isp":
            found.append("weight parallelism needs mode isp")
        if self.layout.expert_tensor and build_layout(case.config, self.ranks).expert_tensor == 1:
            found.append("expert tensor parallelism needs experts, and tensor ranks of another mode than isp")
        if self.layout.expert_overlap and self.layout.expert_weight == 1:
            found.append("nothing to overlap: experts are not split over weight ranks")
        if self.model.float8 and self.model.dtype != "float64":
            found.append("float8 is compared in float64")
        gathers_latents = self.model.family in LATENT_FAMILIES and build_layout(case.config, self.ranks).gathers_latents
        if self.model.float8 and gathers_latents:
            # One process rounds the sum of what context ranks round.
            found.append("float8 of latent attention is not comparable: context ranks round parts of gradients")
        found += self._vision_problems()
        return found

    def _vision_problems(self) -> list[str]:
        """Why choices for a vision tower or a projector would have no effect."""
        plain, is_read = ModelChoices(), self.model.family == "LLAVA"
        found = []
        if not is_read and (self.model.tower, self.model.projector) != (plain.tower, plain.projector):
            found.append("only the family LLAVA has a vision tower and a projector")
        if self.stepping.groups in ("projector", "tower") and not is_read:
            found.append(f"groups={self.stepping.groups} needs the family LLAVA")
        if self.stepping.groups == "projector" and self.model.projector == "identity":
            found.append("groups=projector needs a projector with weights")
        return found

    def case(self) -> Case:
        """The run that this combination describes.

        Raises:
            ConfigError: the number of ranks does not fit the layout.
        """
        layout, model = self.layout, self.model
        data_size = build_layout(_config({**_BASE, **layout.keys()}), self.ranks).data_size
        micro_batches = self.stepping.micro_batches or needed_micro_batches(layout) * data_size
        if micro_batches % data_size:
            raise ConfigError(f"{micro_batches} micro-batches cannot be divided among {data_size} data ranks")
        keys = {
            **_BASE,
            **layout.keys(),
            **_model_keys(model, layout),
            **_micro_num(micro_batches // data_size),
            "hybrid_zero_optimizer.clip_grad_norm": self.stepping.clip,
            "hybrid_zero_optimizer.reduce_bucket_size": self.stepping.bucket,
            "hybrid_zero_optimizer.overlap_sync_grad": self.stepping.overlap_grad,
            "hybrid_zero_optimizer.overlap_sync_param": self.stepping.overlap_param,
            "reduce_comm_dtype": "torch.bfloat16" if self.stepping.reduce_bf16 else None,
            "hybrid_zero_optimizer.grad_accumulation_dtype": _dtype(self.stepping.grad_bf16),
            "hybrid_zero_optimizer.offload_optimizer": self.stepping.offload,
            "adam.moments_dtype": _dtype(self.stepping.moments_bf16),
            "optimizer.groups": PARAMETER_GROUPS[self.stepping.groups],
        }
        return Case(_config(keys), self.ranks, self.documents)


def needed_micro_batches(layout: LayoutChoices) -> int:
    """Micro-batches per data rank with which every schedule has a warm-up, a steady and a cool-down phase."""
    if layout.pipeline == 1:
        return 2
    return (2 if layout.schedule in ("ZBV", "DUALPIPEV") or layout.chunks > 1 else 1) * layout.pipeline


def _model_keys(model: ModelChoices, layout: LayoutChoices) -> dict[str, Any]:
    num_chunks = 2 if layout.schedule in ("ZBV", "DUALPIPEV") else layout.chunks
    # 56 is an odd multiple of 8 ranks, so its halves and quarters are no powers of two.
    head_dim, intermediate_size, kv_heads, seq_len = HEAD_DIM, 56, model.kv_heads, SEQ_LEN
    expert_size = 40
    if model.float8:
        head_dim, intermediate_size, expert_size = FLOAT8_HEAD_DIM, 16 * layout.tensor * 3, 16 * layout.tensor
        kv_heads = float8_kv_heads(kv_heads, layout)
        seq_len = max(SEQ_LEN, FLOAT8_SEQ_LEN * layout.tensor * layout.context)
    keys = {
        "model_type": model.family,
        "use_fp32_norm": model.fp32_norm,
        "model.hidden_size": head_dim * model.heads,
        "model.num_attention_heads": model.heads,
        "model.num_kv_attention_heads": kv_heads,
        "model.num_layers": model.layers or max(2, layout.pipeline * (num_chunks if layout.pipeline > 1 else 1)),
        "model.intermediate_size": intermediate_size,
        "model.vocab_size": model.vocab,
        "model.tie_word_embeddings": model.tied,
        "model.norm_head": model.norm_head,
        "model.qk_norm": model.qk_norm,
        "model.use_sliding_window": True if model.window else None,
        "model.sliding_window": WINDOW if model.window or model.family == "GPT_OSS" else None,
        "model.qkv_bias": model.bias,
        "model.o_bias": model.bias,
        "model.mlp_bias": model.bias,
        "model.enable_qkv_fusion": model.fused,
        "model.mlp_layer_fusion": model.fused,
        "model.embed_split_hidden": model.split_hidden,
        "model.checkpoint": model.checkpoint,
        "model.checkpoint_save_policy": model.save_policy,
        "model.dtype": f"torch.{model.dtype}",
        "model.residual_in_fp32": model.fp32_residual,
        "model.num_experts": model.experts,
        "model.top_k": model.top_k if model.experts > 1 else 1,
        "model.num_shared_experts": model.shared_experts,
        "model.first_k_dense_replace": model.dense_layers,
        "model.num_nextn_predict_layers": model.multi_token,
        "model.moe_intermediate_size": expert_size if model.dense_layers else None,
        **(_router_keys(model) if model.experts > 1 else {}),
        "data.seq_len": seq_len,
        **(FLOAT8_KEYS if model.float8 else {}),
    }
    if model.family in LATENT_FAMILIES:
        keys |= FLOAT8_LATENT_KEYS if model.float8 else LATENT_KEYS
        keys |= dict.fromkeys((*_NOT_OF_LATENT_ATTENTION, *(() if model.q_latent else ("model.q_lora_rank",))))
    if model.family == "LLAVA":
        keys |= vision_keys(model.tower, model.projector, head_dim * model.heads)
    return {path: value for path, value in keys.items() if value is not None}


_NOT_OF_LATENT_ATTENTION = (
    *("model.num_kv_attention_heads", "model.qk_norm", "model.qkv_bias", "model.o_bias", "model.enable_qkv_fusion"),
)


def _router_keys(model: ModelChoices) -> dict[str, Any]:
    selection = dict(SELECTIONS[model.selection])
    return {
        "model.moe_type": selection.pop("moe_type"),
        "model.moe_layer_kwargs": {**ROUTERS[model.router], **selection},
        **ROUTER_LOSSES,
        **(SEQUENCE_LOSS if "scoring_func" in ROUTERS[model.router] else {}),
        **(BIAS_RULE if "selection_bias" in ROUTERS[model.router] else {}),
    }


def float8_kv_heads(kv_heads: int, layout: LayoutChoices) -> int:
    """Number of key-value heads with which float8 can be compared.

    Ranks that share a head would each round their own part of its gradient, while one process rounds the sum.
    """
    return kv_heads if layout.mode == "isp" else max(kv_heads, layout.tensor)


_BASE: dict[str, Any] = {
    "data.seq_len": SEQ_LEN,
    "data.micro_bsz": MICRO_BSZ,
    "data.total_steps": 1,
    "model.vocab_size": 64,
    "model.hidden_size": 32,
    "model.num_layers": 2,
    "model.num_attention_heads": 4,
    "ckpt.enable_save_ckpt": False,
    "adam.lr": LEARNING_RATE,
    "adam.adam_eps": ADAM_EPSILON,
    "adam.weight_decay": 0.1,
}


def _dtype(is_bf16: bool) -> str:
    return "torch.bfloat16" if is_bf16 else "torch.float32"


def _micro_num(number: int) -> dict[str, Any]:
    return {"data.micro_num": number, "data.gradient_accumulation": number}


def changed(config: Config, keys: Mapping[str, Any]) -> Config:
    """Copy a config with other values for some keys, given by dotted path; derived keys are recomputed.

    Raises:
        ConfigError: the schema refuses a value.
    """
    return _built(_set(config.model_dump(exclude_unset=True), keys))


def _config(keys: Mapping[str, Any]) -> Config:
    return _built(_set({}, keys))


def _built(tree: dict[str, Any]) -> Config:
    config, problems = build_config(tree)
    if problems:
        raise ConfigError(problem.text for problem in problems)
    return config


def _set(tree: dict[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    for path, value in keys.items():
        *sections, name = path.split(".")
        values = tree
        for section in sections:
            values = values.setdefault(section, {})
        values[name] = value
    return tree
