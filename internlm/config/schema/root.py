"""The root of a configuration. Its attributes are the globals of a config file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import field_serializer, model_validator

from internlm.config.hf_class import filled_model_section
from internlm.config.schema.base import PathText, Section, key, later, no_effect, section, used_with
from internlm.config.schema.ckpt import CkptConfig
from internlm.config.schema.data import DataConfig
from internlm.config.schema.model import ModelConfig
from internlm.config.schema.moe import MoeConfig
from internlm.config.schema.optim import (
    AdamConfig,
    Beta2SchedulerConfig,
    GradScalerConfig,
    HybridZeroOptimizerConfig,
    LossConfig,
    LrSchedulerConfig,
    OptimizerConfig,
)
from internlm.config.schema.parallel import ParallelConfig
from internlm.config.schema.runtime import (
    CpuOffloadingConfig,
    Float8Config,
    GenerationConfig,
    GradProfilingConfig,
    HfConfig,
    MonitorConfig,
    TensorboardConfig,
)

_S = TypeVar("_S", bound=Section)

HF_CLASS = "hf"
"""The `model_type` of classes of transformers."""


class Config(Section):
    """One run. Built from a config file by `load_config`, or directly in Python."""

    JOB_NAME: str = key("AnonymousJob", "Name of the run; logs go to RUN/<JOB_NAME>/<time>/.", min_length=1)
    model_type: str = key("INTERNLM", "Model family, as registered.", min_length=1, changes_outputs=True)
    seed: int = key(1024, "Seed of weights and of everything random except the data order (data.seed).", ge=0)

    data: DataConfig = section(None, "Where tokens come from and how they become batches.")
    model: ModelConfig = section(None, "Shape and numerics of the model.")
    parallel: ParallelConfig = section(ParallelConfig, "How the ranks are laid out.")
    ckpt: CkptConfig = section(CkptConfig, "Saving, resuming and loading.")
    loss: LossConfig = section(LossConfig, "Cross entropy and additional loss terms.")
    adam: AdamConfig = section(AdamConfig, "AdamW.")
    optimizer: OptimizerConfig = section(OptimizerConfig, "Parameter groups.")
    lr_scheduler: LrSchedulerConfig = section(LrSchedulerConfig, "Learning rate over the steps.")
    beta2_scheduler: Beta2SchedulerConfig = section(Beta2SchedulerConfig, "beta2 over the steps.")
    grad_scaler: GradScalerConfig = section(GradScalerConfig, "Dynamic loss scaling, for float16.")
    hybrid_zero_optimizer: HybridZeroOptimizerConfig = section(
        HybridZeroOptimizerConfig, "Gradient reduction, parameter gathering, clipping."
    )
    monitor: MonitorConfig = section(MonitorConfig, "What a run reports, and how often.")
    tensorboard: TensorboardConfig = section(TensorboardConfig, "The TensorBoard writer.")
    generation: GenerationConfig = section(GenerationConfig, "InternEvo's batch generation.")
    grad_profiling: GradProfilingConfig = section(GradProfilingConfig, "Gradients, layer by layer.")
    cpu_offloading: CpuOffloadingConfig = section(CpuOffloadingConfig, "Activations in host memory.")
    float8: Float8Config = section(Float8Config, "GEMMs in float8.")
    hf: HfConfig = section(HfConfig, "The class of `model_type = 'hf'`.")
    moe: MoeConfig = section(MoeConfig, "Tools for mixtures of experts.")
    hooks: list[Any] = key(
        [],
        "Your own hooks, called in this order after the built-in ones: import paths such as 'package.module.Class', "
        "dict(type=<import path>, <argument>=...), or subclasses and instances of Hook (see hooks.md).",
    )

    use_fp32_norm: bool = key(False, "Keep the weights of norms and compute norms in float32.")
    enable_tb: bool = key(True, "Write TensorBoard events.")
    tensorboard_folder: PathText = key(
        None, "Folder of the events; None: the environment's tensorboard_folder, else <run directory>/tensorboards."
    )
    resume_tb_folder: PathText = key(
        None, "Folder of an earlier run's events to continue; None: the environment's resume_tb_folder."
    )
    cudnn_benchmark: bool = key(False, "Let cuDNN search for its fastest kernels.")
    cudnn_deterministic: bool = key(False, "Use only deterministic cuDNN kernels.")
    reduce_comm_dtype: Literal["torch.bfloat16", "torch.float16", "torch.float32"] | None = key(
        None, "Dtype in which gradients are communicated; None: float32 (InternEvo: model.dtype)."
    )
    metric_dtype: str = no_effect("fp32", "Dtype of metrics.", "metrics are always computed in float32")
    pad_token_id: int | None = no_effect(
        None, "Token that pads short rows.", "padding is masked from attention and loss"
    )
    use_apex_adam: bool = no_effect(False, "Use Apex's AdamW.", "torch's fused AdamW is used")
    DO_ALERT: bool = no_effect(False, "Shorthand of example configs.", "monitor.alert decides")
    batch_count: int = no_effect(0, "InternEvo's step counter.", "the step comes from the checkpoint")

    output_tf32: bool = later(False, "TensorFloat-32 in the output head.", "tf32 for the head alone")
    selective_checkpoint: bool = used_with(
        False, "Older spelling of model.checkpoint_save_policy = 'attention', in every tensor mode.", "model.checkpoint"
    )
    selective_checkpoint_offload: bool = used_with(
        False, "Move what model.checkpoint_save_policy = 'attention' saves to host memory.", "selective_checkpoint"
    )
    only_load_lr: bool = later(False, "Resume only the learning rate of the optimizer.", "partial optimizer state")
    gradient_handler: list[Any] | None = later(
        None,
        "Further gradient handlers; a tied embedding needs none.",
        "gradient handlers",
        accepts=([], [{"type": "PipelineSharedModuleGradientHandler"}]),
    )
    TENSOR_SHAPE: Any = no_effect(None, "Shape of pipeline messages.", "every stage computes the shapes")
    fsdp_wrap_cls: list[dict[str, str]] | None = no_effect(
        None, "Classes that FSDP wraps, as dict(mod, mod_cls).", "FSDP wraps each layer, and the rest of the model"
    )
    fp8: dict[str, Any] | None = later(
        None, "InternEvo's Transformer Engine.", "fp8 by Transformer Engine (use float8 instead)", accepts=({},)
    )
    full_kv_zigzag_with_full_dkv: bool = no_effect(
        False,
        "Sum the gradients of gathered keys and values at once.",
        "parallel.context.exchange decides how keys, values and their gradients travel",
    )
    int8_training: bool = later(False, "GEMMs in int8.", "int8 training")
    int8_mode: str | None = used_with(None, "Granularity of int8 scales.", "int8_training")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_hf(cls, values: Any) -> Any:
        """Fill the model section from the class that `hf` names. The config of a checkpoint has it already."""
        if not isinstance(values, Mapping):
            return values
        model, hf = values.get("model") or {}, values.get("hf") or {}
        if not isinstance(model, Mapping) or not isinstance(hf, Mapping):
            return values
        # InternEvo's configs name a class without a model_type.
        names_class = hf.get("folder") is not None or hf.get("cfg") is not None
        model_type = values.get("model_type", HF_CLASS if names_class else None)
        if model_type != HF_CLASS or model.get("hf_class") is not None:
            return values
        return {**values, "model_type": HF_CLASS, "model": filled_model_section(hf, model)}

    @field_serializer("hooks", when_used="json")
    def _hooks_as_text(self, hooks: list[Any]) -> list[Any]:
        """Convert classes and instances to their import paths, for the JSON copy of the config in a checkpoint."""
        return [_as_text(entry) for entry in hooks]

    @model_validator(mode="after")
    def _fill(self) -> Config:
        schedule, beta2 = self.lr_scheduler, self.beta2_scheduler
        if schedule.total_steps is None:
            self._derive(lr_scheduler=_derived(schedule, total_steps=self.data.total_steps))
        missing = {
            name: value
            for name, value in (("init_beta2", self.adam.adam_beta2), ("c", self.adam.adam_beta2_c))
            if getattr(beta2, name) is None
        }
        if missing:
            self._derive(beta2_scheduler=_derived(beta2, **missing))
        num_chunks = self.parallel.pipeline.forced_num_chunks
        if num_chunks is not None:
            self._derive(model=_derived(self.model, num_chunks=num_chunks))
        if self.selective_checkpoint and "checkpoint_save_policy" not in self.model.model_fields_set:
            self._derive(model=_derived(self.model, checkpoint_save_policy="attention"))
        is_new_mixture = self.model.num_experts > 1 and self.model_type not in _MIXTURES_OF_INTERNEVO
        if is_new_mixture and "moe_type" not in self.model.model_fields_set:
            self._derive(model=_derived(self.model, moe_type="Dropless"))
        model = self.model
        if "max_position_embeddings" not in model.model_fields_set and not model.has_scaled_positions:
            length = max(model.max_position_embeddings, self.data.seq_len)
            self._derive(model=_derived(model, max_position_embeddings=length))
        return self


_MIXTURES_OF_INTERNEVO = ("INTERNLM_MoE", "MIXTRALMOE", "QWEN2MOE", "QWEN3MOE")


def _as_text(entry: Any) -> Any:
    if isinstance(entry, dict):
        return {name: _as_text(value) for name, value in entry.items()}
    if isinstance(entry, list | tuple):
        return [_as_text(value) for value in entry]
    if entry is None or isinstance(entry, str | int | float):
        return entry
    cls = entry if isinstance(entry, type) else type(entry)
    return f"{cls.__module__}.{cls.__qualname__}"


def _derived(part: _S, **values: Any) -> _S:
    """A copy of a section with derived keys filled in; the user's own object is unchanged."""
    copy = part.model_copy()
    copy._derive(**values)
    return copy
