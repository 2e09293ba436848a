"""Hooks named in a config: built from import paths and objects, called at the right points, refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import last_log_line, metrics_of, write_config
from helpers.pages import blocks, text_of
from helpers.ranks import RankPool
from helpers.runs import new_trainer
from helpers.tiny import global_batch, tiny_engine

from internlm.cli import main
from internlm.config.loader import load_config
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.hooks import Hook
from internlm.initialize.user_hooks import build_user_hooks
from internlm.utils.errors import ConfigError


class Recorder(Hook):
    """Notes the order of calls, and what can be read in them."""

    name = "recorder"

    def __init__(self) -> None:
        self.log: list[str] = []
        self.norms: list[float] = []
        self.weights: list[torch.Tensor] = []

    def on_checkpoint_loaded(self, trainer: Any, path: Any) -> None:
        self.log.append(f"loaded {path.name} at {trainer.state.step}, resumed {trainer.resumed_from is not None}")

    def on_fit_start(self, trainer: Any) -> None:
        self.log.append("start")

    def on_before_optimizer_step(self, trainer: Any) -> None:
        self.log.append("before")
        self._measure(trainer)

    def on_after_optimizer_step(self, trainer: Any) -> None:
        self.log.append("after")
        self._measure(trainer)

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        self.log.append(f"end {metrics.step}")
        self.norms.append(float(metrics.grad_norm))

    def _measure(self, trainer: Any) -> None:
        squares = sum(
            float(values.double().square().sum())
            for _, _, pieces in trainer.engine.optimizer.sharded_gradients()
            for _, values in pieces
        )
        self.norms.append(squares**0.5)
        trainer.engine.optimizer.finish_gathering()
        self.weights.append(next(trainer.engine.chunks[0].parameters()).detach().clone())


class Needs(Hook):
    """Takes an argument."""

    name = "needs"

    def __init__(self, target: float, *, every: int = 1) -> None:
        if every < 1:
            raise ValueError("every must be positive")
        self.target, self.every = target, every


class CountsBuilds(Hook):
    """Counts its instances."""

    name = "counts_builds"
    built = 0

    def __init__(self) -> None:
        type(self).built += 1


class Listens(Hook):
    """Misspells an event."""

    name = "listens"

    def on_checkpoint_save(self, trainer: Any, path: Any) -> None: ...


class FailsToLoad(Hook):
    """Cannot restore its state."""

    name = "fails_to_load"

    def state_dict(self) -> dict[str, Any]:
        return {"best": 1.0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise KeyError("worst")


class Namesake(Hook):
    """Has the name of the built-in hook for checkpoints."""

    name = "checkpoint"


def test_the_calls_around_the_optimizer_step(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = new_trainer(tmp_path, 2, every=2, hooks=[recorder])
    trainer.engine.optimizer.clip_grad_norm = 1e-3
    trainer.fit()
    assert recorder.log == ["start", "before", "after", "end 1", "before", "after", "end 2"]
    for step in range(2):
        before, after, metric = recorder.norms[3 * step : 3 * step + 3]
        # Before clipping it is the norm that the metrics have; afterwards the largest one allowed.
        assert before == pytest.approx(metric, rel=1e-5)
        assert after == pytest.approx(1e-3, rel=1e-3)
        assert not torch.equal(recorder.weights[2 * step], recorder.weights[2 * step + 1])
    again = Recorder()
    resumed = new_trainer(tmp_path, 3, every=3, hooks=[again])
    assert resumed.checkpointer is not None
    assert resumed.checkpointer.resume(resumed) is not None  # type: ignore[attr-defined]
    resumed.fit()
    assert again.log == ["loaded 2 at 2, resumed True", "start", "before", "after", "end 3"]


class Counts(Recorder):
    """Has a state."""

    def __init__(self) -> None:
        super().__init__()
        self.num_steps = 0

    def on_checkpoint_loaded(self, trainer: Any, path: Any) -> None:
        super().on_checkpoint_loaded(trainer, path)
        self.log.append(f"{self.num_steps} steps before")

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        super().on_step_end(trainer, metrics)
        self.num_steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_steps = state["num_steps"]


def test_the_state_of_a_hook_goes_on_and_is_there_when_it_hears_of_the_load(tmp_path: Path) -> None:
    new_trainer(tmp_path, 2, every=2, hooks=[Counts()]).fit()
    resumed = new_trainer(tmp_path, 3, every=3, hooks=[again := Counts()])
    assert resumed.checkpointer is not None
    assert resumed.checkpointer.resume(resumed) is not None  # type: ignore[attr-defined]
    resumed.fit()
    assert again.log[:2] == ["loaded 2 at 2, resumed True", "2 steps before"]
    assert again.num_steps == 3


def calls_on_this_rank() -> list[str]:
    recorder = Recorder()
    new_trainer(None, 1, hooks=[recorder]).fit()
    return recorder.log


def test_every_rank_is_called(ranks: Callable[[int], RankPool]) -> None:
    assert ranks(2).run(calls_on_this_rank) == [["start", "before", "after", "end 1"]] * 2


def test_a_load_that_is_no_resume_is_heard_of(tmp_path: Path) -> None:
    """A checkpoint of this package by path, and weights of another format."""
    new_trainer(tmp_path / "first", 2, every=2).fit()
    branch = new_trainer(tmp_path / "second", 3, hooks=[recorder := Recorder()])
    assert branch.checkpointer is not None
    branch.checkpointer.load(branch, tmp_path / "first" / "2", ("model",))  # type: ignore[attr-defined]
    assert recorder.log == ["loaded 2 at 0, resumed False"]


def test_a_method_of_the_object_alone_is_called(tmp_path: Path) -> None:
    hook, calls = Hook(), []
    hook.on_after_optimizer_step = lambda trainer: calls.append(trainer.state.step)  # type: ignore[method-assign]
    new_trainer(None, 2, hooks=[hook]).fit()
    assert calls == [0, 1]


def test_a_hook_that_raises_in_on_exception_hides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Recorder):
        name = "failing"

        def on_fit_start(self, trainer: Any) -> None:
            raise ArithmeticError("the cause")

        def on_exception(self, trainer: Any, error: BaseException) -> None:
            raise ValueError("another error")

    class Listening(Recorder):
        def on_exception(self, trainer: Any, error: BaseException) -> None:
            self.log.append(str(error))

    listening = Listening()
    with pytest.raises(ArithmeticError, match="the cause"):
        new_trainer(None, 1, hooks=[Failing(), listening]).fit()
    assert "the cause" in listening.log
    assert "hook 'failing' raised in on_exception" in caplog.text


def losses_with_and_without_a_hook() -> list[list[float]]:
    context = ParallelContext.create(ParallelLayout(world_size=2, zero=2))
    found = []
    for between in (None, lambda: None):
        engine = tiny_engine(context)
        found.append(
            [
                float(
                    engine.train_step(global_batch(step, 2, context.rank, 2), 0.1, before_optimizer_step=between).loss
                )
                for step in range(3)
            ]
        )
    context.close()
    return found


def test_early_reduction_changes_no_bit(ranks: Callable[[int], RankPool]) -> None:
    for with_hook, without in ranks(2).run(losses_with_and_without_a_hook):
        assert with_hook == without


def test_train_step_is_its_two_halves() -> None:
    context = ParallelContext.create()
    whole, halves = tiny_engine(context), tiny_engine(context)
    for step in range(3):
        batch = global_batch(step)
        expected = whole.train_step(batch, 0.1)
        found = halves.optimizer_step(halves.forward_backward(batch), 0.1)
        assert torch.equal(expected.loss, found.loss) and torch.equal(expected.grad_norm, found.grad_norm)


def test_entries_of_every_kind() -> None:
    ready = Recorder()
    path = f"{__name__}.Needs"
    hooks = build_user_hooks([ready, {"type": path, "target": 2.0, "every": 3}])
    assert hooks[0] is ready
    assert (hooks[1].target, hooks[1].every) == (2.0, 3)  # type: ignore[attr-defined]
    assert type(build_user_hooks([Recorder])[0]) is Recorder
    assert type(build_user_hooks([f"{__name__}.Recorder"])[0]).__name__ == "Recorder"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("Recorder", r"hooks\[0\] = 'Recorder': expected \"package.module.Class\""),
        ("no_such_module.Hook", r"No module named 'no_such_module'; modules are searched in"),
        ("internlm.core.hooks.Hok", r"'internlm.core.hooks' has no 'Hok'. Did you mean 'Hook'\?"),
        ("internlm.core.trainer.Trainer", "is not a subclass of internlm.core.hooks.Hook"),
        (7, "is not a subclass of"),
        ({"target": 1}, r"give dict\(type="),
        ({"type": Needs}, r"Needs\(target.*missing a required argument: 'target'"),
        ({"type": Needs, "target": 1, "evry": 2}, "unexpected keyword argument 'evry'"),
        (Listens, r"hooks\[0\]: Listens.on_checkpoint_save is never called. Did you mean 'on_checkpoint_saved'\?"),
        ({"type": Needs, "target": 1, "every": 0}, "Needs could not be built: ValueError: every must be positive"),
    ],
)
def test_mistakes_are_named(entry: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_user_hooks([entry])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1\n1 / 0\n", "raised ZeroDivisionError: division by zero .*own_hooks.py, line 2"),
        ("import sys\nsys.exit(0)\n", "raised SystemExit: 0 .*own_hooks.py, line 2"),
        ("import not_installed\n", "raised ModuleNotFoundError: No module named 'not_installed' .*hooks.py, line 1"),
        ("def broken(:\n", "raised SyntaxError: "),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_with_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    (tmp_path / "own_hooks.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=rf"hooks\[0\] = 'own_hooks.Mine': importing 'own_hooks' {words}"):
        build_user_hooks(["own_hooks.Mine"])


def test_a_start_builds_each_hook_once(tmp_path: Path) -> None:
    config = write_config(tmp_path, f"hooks = ['{__name__}.CountsBuilds']\ndata['total_steps'] = 1\n")
    CountsBuilds.built = 0
    assert main(["train", "--config", str(config), "--run-dir", str(tmp_path / "run")]) == 0
    assert CountsBuilds.built == 1


def test_a_hook_that_cannot_restore_its_state_is_named(tmp_path: Path) -> None:
    config = write_config(tmp_path, f"hooks = ['{__name__}.FailsToLoad']\n")
    run = ["train", "--config", str(config), "--run-dir", str(tmp_path / "run")]
    assert main([*run, "--set", "data.total_steps=5"]) == 0
    assert main([*run, "--set", "data.total_steps=6"]) == 1
    assert "in phase 'start, fails_to_load: load_state_dict': KeyError" in last_log_line(tmp_path / "run", 0)


def test_a_hook_that_cannot_be_copied(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        f"import threading\nimport {__name__} as own\nhooks = [own.Recorder()]\nhooks[0].lock = threading.Lock()\n",
    )
    (hook,) = load_config(config).config.hooks
    assert isinstance(hook, Recorder) and hook.lock.acquire()  # type: ignore[attr-defined]


def test_names_are_unique(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hooks\[1\]: Recorder.name = 'recorder' is also that of hooks\[0\]"):
        build_user_hooks([Recorder, Recorder])
    config = write_config(tmp_path, f"hooks = ['{__name__}.Namesake']\n")
    assert main(["train", "--config", str(config), "--run-dir", str(tmp_path / "run")]) == 2
    with pytest.raises(ValueError, match="two hooks are named 'recorder'"):
        new_trainer(tmp_path, 1, hooks=[Recorder(), Recorder()])


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [source for source in blocks(text_of("doc/hooks.md"), "python") if "class " in source]
    assert len(sources) == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page_hooks.py").write_text("\n\n".join(sources))
    config = write_config(
        tmp_path,
        "hooks = [dict(type='page_hooks.LargestGradient', every=2), dict(type='page_hooks.StopAtLoss', target=100.0),"
        " 'page_hooks.CheckpointList']\n",
    )
    arguments = ["train", "--config", str(config), "--run-dir", str(tmp_path / "run")]
    assert main([*arguments, "--dry-run"]) == 0
    assert main(arguments) == 0
    # The loss is far below 100: the run stops at once, with a checkpoint.
    (saved,) = (tmp_path / "checkpoints").glob("[0-9]*")
    log = (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert "step 1: largest gradient " in log and "reached 100.0" in log
    assert (tmp_path / "checkpoints.txt").read_text() == f"{saved}\n"
    context = json.loads((saved / "context.json").read_text())
    assert context["hooks"]["stop_at_loss"]["best"] == min(line["loss"] for line in metrics_of(tmp_path / "run"))
    kept = json.loads((saved / "config.json").read_text())
    assert kept["hooks"][2] == "page_hooks.CheckpointList"
    assert main([*arguments, "--set", "hooks=[]"]) == 0
    log = (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert "the checkpoint has the state of hooks that this run lacks: stop_at_loss" in log


def test_objects_in_a_config_are_kept_as_import_paths(tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(
        write_config(tmp_path, name="base.py").read_text()
        + f"import {__name__} as own\nhooks = [own.Recorder, dict(type=own.Needs, target=1.0)]\n"
    )
    loaded = load_config(config).config
    assert loaded.model_dump(mode="json")["hooks"] == [
        f"{__name__}.Recorder",
        {"type": f"{__name__}.Needs", "target": 1.0},
    ]
