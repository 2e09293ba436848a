"""The progress bar, the plain lines, and what is told of skipped updates."""

from __future__ import annotations

import ast
import io
import logging
import math
import re
import sys

import pytest
import torch
from helpers.fake_trainer import FakeTrainer, step_metrics
from rich.console import Console

from internlm.core.step_metrics import StepMetrics
from internlm.eval.hook import EvaluationHook
from internlm.monitor.console import ConsoleHook, describe, describe_duration
from internlm.monitor.metrics_collector import MetricsCollector
from internlm.monitor.throughput import FlopsModel, Throughput
from internlm.utils.logging import ROOT_LOGGER, configure_logging, get_logger


@pytest.fixture
def log_lines():
    """What the project logs while the test runs."""
    lines: list[str] = []

    class SavePolicy(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    logger, handler = logging.getLogger(ROOT_LOGGER), SavePolicy()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def plain(log_every: int) -> ConsoleHook:
    return ConsoleHook(MetricsCollector(clock=lambda: 0.0), log_every, console=Console(file=io.StringIO()))


def test_plain_lines_first_every_and_last(tmp_path, log_lines):
    FakeTrainer(tmp_path, [plain(3)], total_steps=7).fit()
    assert [int(re.match(r"step (\d+)/7 ", line).group(1)) for line in log_lines] == [1, 3, 6, 7]
    assert "loss 3.3333" in log_lines[1] and "lr 1.000e-03" in log_lines[1] and "grad_norm 1.250" in log_lines[1]
    assert "tgs 2000 (mean 2000)" in log_lines[1] and log_lines[1].endswith("eta 0:00:02")  # 4 steps of 0.5 s left
    assert log_lines[-1].endswith("eta 0:00:00")


def test_steps_that_are_not_shown_wait_for_nothing(tmp_path, monkeypatch):
    waits = []
    original = StepMetrics.numbers
    monkeypatch.setattr(StepMetrics, "numbers", lambda self: waits.append(self.step) or original(self))
    FakeTrainer(tmp_path, [plain(5)], total_steps=10).fit()
    assert waits == [1, 5, 10]


def test_skipped_updates_are_told_once_with_their_number(tmp_path, log_lines):
    skipped_steps = {2, 3, 8}

    def metrics(step):
        return step_metrics(
            step,
            skipped=torch.tensor(float(step in skipped_steps)),
            inf_nan_skip_batches=torch.tensor(5.0 + sum(s <= step for s in skipped_steps)),  # 5 before a resume
            loss_scale=torch.tensor(512.0),
        )

    FakeTrainer(tmp_path, [plain(4)], total_steps=12, metrics=metrics).fit()
    told = [line for line in log_lines if "skipped" in line]
    assert len(told) == 2
    assert told[0].startswith("step 4: 2 update(s) skipped") and "7 since the start" in told[0]
    assert told[1].startswith("step 8: 1 update(s) skipped") and "loss scale is now 512" in told[1]


def test_a_terminal_gets_a_bar_and_log_lines_above_it(tmp_path, monkeypatch):
    screen, stderr = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure_logging()  # its handler holds the stderr of now
    console = Console(file=screen, force_terminal=True, width=160)
    try:
        FakeTrainer(
            tmp_path,
            [ConsoleHook(MetricsCollector(clock=lambda: 0.0), console=console), EvaluationHook(2)],
            total_steps=4,
        ).fit()
        get_logger().info("after the bar")
    finally:
        logging.getLogger(ROOT_LOGGER).handlers.clear()
        logging.getLogger(ROOT_LOGGER).propagate = True
    text = screen.getvalue()
    assert "4/4" in text and "loss 2.5000" in text and "eta 0:00:00" in text
    # A log line on the raw stderr would land in the middle of the bar.
    assert text.count("val/books_loss 2.5000") == 2 and "val/books" not in stderr.getvalue()
    assert "after the bar" in stderr.getvalue() and "after the bar" not in text


def test_a_bar_gives_the_terminal_back_after_an_exception(tmp_path):
    screen = io.StringIO()
    hook = ConsoleHook(MetricsCollector(), console=Console(file=screen, force_terminal=True, width=160))
    with pytest.raises(RuntimeError):
        FakeTrainer(tmp_path, [hook]).fit(fail_at=2)
    assert screen.getvalue().rstrip().endswith("\x1b[?25h")  # shows the cursor again


def test_other_ranks_are_silent(tmp_path, log_lines):
    FakeTrainer(tmp_path, [plain(1), EvaluationHook(1)], is_main_rank=False).fit()
    assert log_lines == []


def test_description():
    collector = MetricsCollector(Throughput(flops=FlopsModel(full=2e9, causal=1e9, peak=1e13)), clock=lambda: 0.0)
    text = describe(collector.numbers(step_metrics(2, loss_scale=torch.tensor(65536.0))))
    assert "loss_scale 65536" in text and "tflops 2" in text and "mfu 20.0%" in text
    assert describe_duration(3723.4) == "1:02:03"
    assert describe_duration(float("nan")) == "-"


# Lines of InternEvo's documentation and logs, numbers changed: two types, of which one has no token.
INTERNEVO_LINE = (
    "record_current_batch_training_metrics -- tflops=252.4 step=199 loss=0.0004 real_tgs=2055.59 "
    "tgs (tokens/gpu/second)=2511.37 tgs/last_tgs_1=2511.37 tgs/tgs_all=2481.83 tgs/tgs_avg=2508.74 "
    "tgs/tgs_SMA=2510.99 tgs/last_tgs_10=2510.67 tgs/last_tgs_50=2510.99 lr=1e-05 loss_scale=65536.0 "
    "grad_norm={'0_default': 0.00021934305195273646, '1_fp32': 0.0} micro_num=8 num_consumed_tokens=209715200 "
    "inf_nan_skip_batches=0 num_samples_in_batch=8 largest_length=32768 largest_batch=1 smallest_batch=1 "
    "adam_beta2=0.95 fwd_bwd_time=12.87 bwd_time=8.69 acc=1.0 perplexity=1.0006 acc/en=1.0 acc/cn=0.0 tokens/en=858249 "
    "tokens/cn=0 loss_from_metric=0.0006 loss/en=0.0006 loss/cn=nan "
)


def parse_as_users_do(line):
    """Name -> text, in order; a value is a dict or has no space."""
    return dict(re.findall(r"((?:tgs \()?[\w/.]+(?:/second\))?)=(\{[^}]*\}|\S+) ", line))


def test_internevo_lines_have_its_names_in_its_order(tmp_path, log_lines):
    def metrics(step):
        types = {"en": 900.0, "cn": 0.0}
        extra = {"acc": 0.51239, "perplexity": 22026.46579, "loss_from_metric": 10.00001}
        for name, tokens in types.items():
            extra |= {f"loss/{name}": 3.14159 if tokens else math.nan, f"acc/{name}": 0.51239 if tokens else math.nan}
            extra[f"tokens/{name}"] = tokens
        skipped = torch.tensor(float(step == 2))
        values = {name: torch.tensor(value, dtype=torch.float64) for name, value in extra.items()}
        return step_metrics(step, extra=values, skipped=skipped, inf_nan_skip_batches=torch.tensor(float(step >= 2)))

    collector = MetricsCollector(Throughput(flops=FlopsModel(full=2e9, causal=1e9)), clock=lambda: 0.0)
    hook = ConsoleHook(collector, 1, "internevo", console=Console(file=io.StringIO(), force_terminal=True))
    FakeTrainer(tmp_path, [hook], total_steps=3, metrics=metrics).fit()
    lines = [line for line in log_lines if "record_current_batch_training_metrics -- " in line]
    assert len(lines) == 2 and "1 update(s) skipped" in log_lines[1]
    known, found = parse_as_users_do(INTERNEVO_LINE), parse_as_users_do(lines[1])
    assert list(found) == [name for name in known if name != "bwd_time"]
    for name, text in found.items():  # a whole number where theirs is one, rounded as theirs
        assert text.isdigit() == known[name].isdigit(), name
    assert (found["step"], found["inf_nan_skip_batches"], found["num_samples_in_batch"]) == ("2", "1", "4")
    assert found["tgs (tokens/gpu/second)"] == found["tgs/last_tgs_1"] == "2000.0"
    assert ast.literal_eval(found["grad_norm"]) == {"0_default": 1.25}
    assert (found["tflops"], found["real_tgs"], found["fwd_bwd_time"]) == ("4.0", "1800.0", "0.4")
    assert (found["acc"], found["perplexity"], found["acc/en"], found["acc/cn"]) == (
        "0.5124",
        "22026.4658",
        "0.5124",
        "0.0",
    )
    assert (found["tokens/cn"], found["loss/en"], found["loss/cn"]) == ("0", "3.1416", "nan")


def test_an_evaluation_that_is_not_finite_is_a_warning(tmp_path, log_lines):
    hook = plain(1)
    hook.on_evaluation_end(FakeTrainer(tmp_path, [hook]), {"val/books_loss": math.nan, "val/books_acc": 0.5})
    assert log_lines[-1] == "step 0: val/books_loss: not finite"
