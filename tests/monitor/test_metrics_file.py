"""metrics.jsonl: one strict JSON object a step, and a function of the run across interruptions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.fake_trainer import FakeTrainer, step_metrics

from internlm.core.hooks import Hook
from internlm.eval.hook import EvaluationHook
from internlm.monitor.metrics_collector import MetricsCollector
from internlm.monitor.metrics_file import MetricsFileHook
from internlm.monitor.throughput import FlopsModel, Throughput


def strict_lines(run_dir) -> list[dict]:
    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def run(run_dir, total_steps=4, start=0, fail_at=None, extra_hooks=(), **fields) -> FakeTrainer:
    hooks = [MetricsFileHook(MetricsCollector()), *extra_hooks]
    trainer = FakeTrainer(run_dir, hooks, total_steps, start, metrics=lambda step: step_metrics(step, **fields))
    if fail_at is None:
        trainer.fit()
    else:
        with pytest.raises(RuntimeError):
            trainer.fit(fail_at)
    return trainer


def test_one_object_a_step_with_the_contracts_names(tmp_path):
    extra = {"acc": torch.tensor(0.25), "perplexity": torch.tensor(9.0), "loss/en": torch.tensor(2.0)}
    collector = MetricsCollector(Throughput(flops=FlopsModel(full=2e9, causal=1e9, peak=1e14)))
    hooks = [MetricsFileHook(collector)]
    FakeTrainer(tmp_path, hooks, metrics=lambda step: step_metrics(step, extra=extra)).fit()
    lines = strict_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {
        *("step", "loss", "grad_norm", "lr", "loss_scale", "tgs", "tgs/tgs_avg", "tgs/tgs_SMA", "tgs/last_tgs_10"),
        *("real_tgs", "tflops", "mfu", "mfu_convention", "num_consumed_tokens", "valid_tokens", "skipped"),
        *("inf_nan_skip_batches", "micro_num", "num_samples_in_batch", "adam_beta2", "fwd_bwd_time", "acc"),
        *("perplexity", "loss/en"),
    } <= lines[0].keys()
    assert [line["loss"] for line in lines] == pytest.approx([10, 5, 10 / 3, 2.5])
    assert lines[3]["num_consumed_tokens"] == 4000 and lines[3]["valid_tokens"] == 900


def test_values_that_are_not_finite_are_strict_json(tmp_path):
    run(tmp_path, 1, loss=torch.tensor(math.nan), grad_norm=torch.tensor(math.inf))
    (line,) = strict_lines(tmp_path)
    assert line["loss"] is None and line["grad_norm"] is None
    assert line["nonfinite"] == {"loss": "nan", "grad_norm": "inf"}


def test_an_evaluation_is_on_the_line_of_its_step(tmp_path):
    trainer = run(tmp_path, 5, extra_hooks=[EvaluationHook(2)])
    assert trainer.evaluated_at == [2, 4, 5]
    lines = strict_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line.get("val/books_loss") for line in lines] == [None, 2.5, None, 2.5, 2.5]


class SaveAt(Hook):
    """Saves at one step, and looks at the metrics file at that instant."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.lines_on_file: list[dict] = []

    def on_step_end(self, trainer, metrics):
        if metrics.step == self.step:
            trainer.save_checkpoint()
            self.lines_on_file = strict_lines(trainer.run_dir)


def test_a_saved_step_is_on_file_and_evaluation_after_it_gets_its_own_line(tmp_path):
    save = SaveAt(2)
    run(tmp_path, 3, extra_hooks=[save, EvaluationHook(2)])
    assert [line["step"] for line in save.lines_on_file] == [1, 2]
    lines = strict_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 2, 3]
    assert lines[2] == {"step": 2, "val/books_loss": 2.5, "val/books_acc": 0.5, "val/books_plex": 12.18}


def test_a_resumed_run_leaves_the_file_of_a_whole_run(tmp_path):
    run(tmp_path / "whole", 6, extra_hooks=[EvaluationHook(2)])
    run(tmp_path / "cut", 6, fail_at=6, extra_hooks=[EvaluationHook(2)])
    assert [line["step"] for line in strict_lines(tmp_path / "cut")] == [1, 2, 3, 4, 5]  # the exception lost none
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    run(tmp_path / "cut", 6, start=3, extra_hooks=[EvaluationHook(2)])
    cut, whole = (strict_lines(tmp_path / name) for name in ("cut", "whole"))
    assert [line["step"] for line in cut] == [1, 2, 3, 4, 5, 6]
    assert [(line["loss"], line.get("val/books_acc")) for line in cut] == [
        (line["loss"], line.get("val/books_acc")) for line in whole
    ]


def test_what_is_trained_anew_is_replaced_and_not_lost(tmp_path):
    """Also the lines of another run that was started in the same run directory."""
    run(tmp_path, 4)
    run(tmp_path, 4, start=2)
    run(tmp_path, 1)
    assert [line["step"] for line in strict_lines(tmp_path)] == [1]
    replaced = (tmp_path / "metrics.replaced.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in replaced] == [3, 4, 1, 2, 3, 4]


def test_only_the_main_rank_writes(tmp_path):
    FakeTrainer(tmp_path, [MetricsFileHook(MetricsCollector())], is_main_rank=False).fit()
    assert list(tmp_path.iterdir()) == []
