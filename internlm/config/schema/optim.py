"""The sections of an optimizer step: loss, gradient scaling, ZeRO, AdamW and the schedules."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, model_validator

from internlm.config.schema.base import Section, key, later, no_effect, section, used_with


class Fp16ScalerConfig(Section):
    """Bounds and growth of the dynamic loss scale."""

    initial_scale: float = key(2.0**16, "Loss scale of the first step.", gt=0)
    min_scale: float | None = key(1.0, "Lower bound of the scale; None: that of float32.", gt=0)
    growth_interval: int = key(1000, "Steps without overflow after which the scale grows.", ge=1)


class GradScalerConfig(Section):
    """Dynamic loss scaling. Used when model.dtype is torch.float16; bfloat16 and float32 need no scale."""

    fp16: Fp16ScalerConfig = section(Fp16ScalerConfig, "Bounds and growth of the dynamic loss scale.")
    growth_factor: float = key(2.0, "Factor by which the scale grows.", ge=1)
    backoff_factor: float = key(0.5, "Factor by which the scale shrinks on overflow.", gt=0, le=1)
    max_scale: float | None = key(2.0**24, "Upper bound of the scale; None: that of float32.", gt=0)
    hysteresis: int = key(
        2, "Number of overflows since the last growth from which on each one shrinks the scale; 0 is 1.", ge=0
    )

    @property
    def scale_bounds(self) -> tuple[float, float]:
        """The smallest and the largest scale; those of normal float32 numbers where a bound is None."""
        low, high = self.fp16.min_scale, self.max_scale
        return 2.0**-126 if low is None else low, 2.0**127 if high is None else high


class HybridZeroOptimizerConfig(Section):
    """Gradient reduction, parameter gathering and clipping."""

    overlap_sync_grad: bool = key(False, "Reduce gradients during backward.")
    overlap_sync_param: bool = key(False, "Gather updated parameters during the next forward.")
    reduce_bucket_size: int = key(512 * 1024 * 1024, "Largest bucket of reduced gradients, in elements.", ge=1)
    clip_grad_norm: float = key(
        0.0, "Clip gradients to this global norm; 0 disables clipping.", ge=0, allow_inf_nan=True
    )
    grad_accumulation_dtype: Literal["torch.float32", "torch.bfloat16"] = key(
        "torch.float32",
        "Dtype in which gradients of half-precision weights are accumulated over micro-batches and stored.",
    )
    offload_optimizer: bool = key(
        False, "Keep fp32 masters and moments in host memory, where the CPU updates them; see doc/memory.md."
    )
    use_split_tensor_optim: bool = no_effect(
        False, "Split tensors evenly over ranks.", "ZeRO here always splits evenly"
    )
    all_gather_size: int = used_with(
        512 * 1024 * 1024, "Elements of one gather.", "hybrid_zero_optimizer.use_split_tensor_optim", ge=1
    )


Share = Annotated[float, BeforeValidator(lambda value: 0.0 if value is None else value)]
"""A number; None is converted to 0."""


class LossConfig(Section):
    """Cross entropy and additional loss terms."""

    label_smoothing: Share = key(
        0.0, "Fraction of the target probability that is spread over the vocabulary.", ge=0, lt=1
    )
    op_type: Literal["py_vocab_parallel", "torch_naive", "apex_naive", "py_naive", "flash_vocab_parallel"] = no_effect(
        "py_vocab_parallel", "InternEvo's cross entropy kernel.", "one fused cross entropy serves every kind"
    )
    z_loss_coeff: float = key(0.0, "Coefficient of the squared log-sum-exp of the logits (PaLM's z-loss).", ge=0)
    moe_loss_coeff: float = used_with(
        1.0, "Coefficient of the load-balancing loss, summed over layers.", "model.num_experts", ge=0
    )
    moe_z_loss_coeff: float = used_with(
        0.0,
        "Coefficient of the squared log-sum-exp of the routers' logits (ST-MoE's z-loss).",
        "model.num_experts",
        ge=0,
    )
    moe_sequence_loss_coeff: float = used_with(
        0.0,
        "Coefficient of the load-balancing loss of each sequence (DeepSeek-V3: 0.0001), summed over layers.",
        "model.num_experts",
        ge=0,
    )
    moe_bias_update_rate: float = used_with(
        0.0,
        "Change of a selection bias in each step, towards equal loads (DeepSeek-V3: 0.001); 0 leaves them as they are.",
        "model.moe_layer_kwargs.selection_bias",
        ge=0,
    )
    moe_bias_centered: bool = used_with(
        False,
        "Subtract the mean over the experts from these changes, so that the biases do not drift.",
        "loss.moe_bias_update_rate",
    )
    multi_token_loss_coeff: float = used_with(
        0.3,
        "Coefficient of the mean of the losses of later tokens.",
        "model.num_nextn_predict_layers",
        ge=0,
    )
    mtp_loss_coeff: float = later(
        0.0,
        "Coefficient of the loss of extra_pred_tokens.",
        "mtp_loss_coeff (use loss.multi_token_loss_coeff instead)",
        ge=0,
    )


class AdamConfig(Section):
    """AdamW (Loshchilov and Hutter, 2019)."""

    lr: float = key(1e-4, "Peak learning rate.", ge=0)
    adam_beta1: float = key(0.9, "Decay rate of the first moment.", ge=0, lt=1)
    adam_beta2: float = key(0.95, "Decay rate of the second moment.", ge=0, lt=1)
    adam_beta2_c: float = key(0.0, "Exponent of the beta2 schedule; 0 keeps beta2 constant.")
    adam_eps: float = key(1e-8, "Epsilon added to the denominator.", ge=0)
    weight_decay: float = key(0.01, "Decoupled weight decay.", ge=0)
    clip_grad: float | None = no_effect(
        None, "Clipping, as some configs of InternEvo have it.", "hybrid_zero_optimizer.clip_grad_norm decides"
    )
    moments_dtype: Literal["torch.float32", "torch.bfloat16"] = key(
        "torch.float32",
        "Dtype of both moments between steps; torch.bfloat16 uses stochastic rounding.",
    )
    weight_decay_norms_and_biases: bool = key(
        False, "Decay norm weights and biases too, as InternEvo does; False leaves them undecayed."
    )


class ParameterGroupConfig(Section):
    """Options for the parameters whose names match a pattern."""

    match: str = key(..., "Glob pattern over the names of parameters, such as '*.attention_norm.*'.", min_length=1)
    weight_decay: float | None = key(None, "Weight decay; None: as without the group.", ge=0)
    lr_factor: float = key(1.0, "Factor on the learning rate.", ge=0)
    freeze: bool = key(False, "Do not train these parameters: no gradient, no optimizer state.")

    @model_validator(mode="after")
    def _frozen_alone(self) -> ParameterGroupConfig:
        if self.freeze and (self.weight_decay or self.lr_factor != 1.0):
            raise ValueError("a dict without weight_decay and lr_factor, as it sets freeze=True")
        return self


class OptimizerConfig(Section):
    """Parameter groups of the optimizer."""

    groups: list[ParameterGroupConfig] = key(
        [],
        "Options by parameter name, as dict(match, weight_decay, lr_factor, freeze). Only the last group that matches "
        "a parameter applies; a group that matches no parameter is an error.",
    )


class LrSchedulerConfig(Section):
    """Learning rate over the steps: zero, linear warm-up, then a decay to eta_min."""

    type: Literal["cosine", "wsd", "linear", "constant"] = key(
        "cosine", "Shape of the decay; wsd is warm-up, stable, decay."
    )
    total_steps: int = key(None, "Step at which the decay ends.", derived="data.total_steps", ge=1)
    init_steps: int = key(0, "Number of first steps with learning rate 0.", ge=0)
    warmup_ratio: float = key(0.01, "Fraction of total_steps for the linear warm-up.", ge=0, le=1)
    eta_min: float = key(0.0, "Final learning rate.", ge=0)
    advance: Literal["step", "update"] = key(
        "step",
        "What advances learning rate and beta2. step: every step. update: only steps that update the weights, as in "
        "InternEvo; not an overflow or a batch of data.skip_batches.",
    )
    last_epoch: int = key(-1, "Number of steps to skip at the start of the schedule, minus one.", ge=-1)
    decay_ratio: float = key(0.1, "wsd: fraction of total_steps for the final decay.", ge=0, le=1)


class Beta2SchedulerConfig(Section):
    """beta2 over the steps: constant for c <= 0, else max(init_beta2, 1 - step ** -c)."""

    init_beta2: float = key(None, "Initial and smallest beta2.", derived="adam.adam_beta2", ge=0, lt=1)
    c: float = key(None, "Exponent; c <= 0 keeps beta2 constant.", derived="adam.adam_beta2_c")
    cur_iter: int = key(-1, "Number of steps to skip at the start of the schedule, minus one.", ge=-1)
