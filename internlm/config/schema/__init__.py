"""The typed schema of a configuration: `Config` and its sections."""

from internlm.config.schema.base import Section
from internlm.config.schema.ckpt import CkptConfig, LoadCkptInfo, UniversalCkptConfig
from internlm.config.schema.data import BlendEntryConfig, DataConfig, FimConfig
from internlm.config.schema.model import InjectInfoConfig, ModelConfig
from internlm.config.schema.moe import MoeConfig, MoeLayerConfig, MoeReplayConfig
from internlm.config.schema.optim import (
    AdamConfig,
    Beta2SchedulerConfig,
    Fp16ScalerConfig,
    GradScalerConfig,
    HybridZeroOptimizerConfig,
    LossConfig,
    LrSchedulerConfig,
    OptimizerConfig,
    ParameterGroupConfig,
)
from internlm.config.schema.parallel import (
    ContextConfig,
    ExpertConfig,
    ExpertWeightConfig,
    ExpertZero1Config,
    FsdpConfig,
    ParallelConfig,
    PipelineConfig,
    Sequence2DConfig,
    TensorConfig,
    WeightConfig,
    Zero1Config,
)
from internlm.config.schema.root import Config
from internlm.config.schema.rope_scaling import RopeScalingConfig
from internlm.config.schema.runtime import (
    AlertConfig,
    CpuOffloadingConfig,
    Float8Config,
    GenerationConfig,
    GradProfilingConfig,
    HfConfig,
    MonitorConfig,
    TensorboardConfig,
)

__all__ = [
    "AdamConfig",
    "AlertConfig",
    "Beta2SchedulerConfig",
    "BlendEntryConfig",
    "CkptConfig",
    "Config",
    "ContextConfig",
    "CpuOffloadingConfig",
    "DataConfig",
    "ExpertConfig",
    "ExpertWeightConfig",
    "ExpertZero1Config",
    "FimConfig",
    "Float8Config",
    "Fp16ScalerConfig",
    "FsdpConfig",
    "GenerationConfig",
    "GradProfilingConfig",
    "GradScalerConfig",
    "HfConfig",
    "HybridZeroOptimizerConfig",
    "InjectInfoConfig",
    "LoadCkptInfo",
    "LossConfig",
    "LrSchedulerConfig",
    "ModelConfig",
    "MoeConfig",
    "MoeLayerConfig",
    "MoeReplayConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ParameterGroupConfig",
    "PipelineConfig",
    "RopeScalingConfig",
    "Section",
    "Sequence2DConfig",
    "TensorConfig",
    "TensorboardConfig",
    "UniversalCkptConfig",
    "WeightConfig",
    "Zero1Config",
]
