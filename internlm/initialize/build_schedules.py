"""Builds the schedules of learning rate and beta2 from a config."""

from __future__ import annotations

from internlm.config.schema import Config
from internlm.solver.beta2_scheduler import Beta2Schedule
from internlm.solver.lr_scheduler import LearningRateSchedule


def build_schedules(config: Config) -> tuple[LearningRateSchedule, Beta2Schedule]:
    """The learning rate and AdamW's beta2 as functions of the step."""
    lr, beta2 = config.lr_scheduler, config.beta2_scheduler
    return (
        LearningRateSchedule(
            shape=lr.type,
            base_lr=config.adam.lr,
            total_steps=lr.total_steps,
            init_steps=lr.init_steps,
            warmup_ratio=lr.warmup_ratio,
            eta_min=lr.eta_min,
            decay_ratio=lr.decay_ratio,
            last_epoch=lr.last_epoch,
        ),
        Beta2Schedule(beta2.init_beta2, beta2.c, beta2.cur_iter),
    )
