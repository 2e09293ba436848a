"""The train command as a user runs it: what it writes and says, that a resumed run is the same run, and that ranks do
not change it."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.commands import LAUNCHER_VARIABLES, metrics_of, start_ranks, start_training, write_config
from helpers.processes import wait_for_all
from helpers.runs import steps_in
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

REPOSITORY = Path(__file__).parents[2]

# Sums in another order: a few roundings of fp32 in the loss, and as many again for each step that AdamW took since.
SAME_LOSS = 1e-6


class Run(NamedTuple):
    """A finished run of the command."""

    folder: Path
    run_dir: Path
    code: int
    output: str

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return metrics_of(self.run_dir)


def as_users_do(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command line in a process of its own, with stdout and stderr together."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env={
            **{name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES},
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            **environment,
        },
    )


def train(folder: Path, *arguments: object, run: str = "run", config: Path | None = None) -> Run:
    """One process, forked."""
    config = config or folder / "config.py"
    command = start_training(["--config", config, "--run-dir", folder / run, *arguments], folder / f"{run}.txt")
    return Run(folder, folder / run, command.wait(), command.output)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ten steps in one go, in a process of its own: `python train.py --config ...`, with TensorBoard."""
    folder = tmp_path_factory.mktemp("straight")
    config = write_config(folder, "enable_tb = True")
    result = as_users_do(REPOSITORY / "train.py", "--config", config, "--run-dir", folder / "run")
    return Run(folder, folder / "run", result.returncode, result.stdout)


# -- what a run leaves ----------------------------------------------------------------------------------------------

METRICS = {
    "step", "loss", "grad_norm", "skipped", "loss_scale", "valid_tokens", "inf_nan_skip_batches", "acc", "perplexity",
    "loss_from_metric", "tokens/en", "tokens/cn", "tokens/code", "lr", "adam_beta2", "num_tokens",
    "num_samples_in_batch", "micro_num", "num_consumed_tokens", "num_consumed_samples", "fwd_bwd_time",
    "optimizer_time", "data_time", "total_time", "real_tgs", "tgs", "tgs/last_tgs_1", "tgs/last_tgs_10",
    "tgs/last_tgs_50", "tgs/tgs_SMA", "tgs/tgs_all", "tgs/tgs_avg", "tflops", "tflops_full", "mfu_convention",
}  # fmt: skip


def test_a_run_succeeds_and_says_what_it_does(straight: Run) -> None:
    assert straight.code == 0, straight.output
    assert "tiny: 1 rank(s) on " in straight.output
    assert f"starting from scratch (no complete checkpoint in {straight.folder}/checkpoints)" in straight.output
    shown = [int(step) for step in re.findall(r"step (\d+)/10  loss \d+\.\d{4}  lr", straight.output)]
    assert shown == list(range(1, 11))
    assert straight.output.splitlines()[-1].endswith("done: 10 steps, 640 tokens")
    log = (straight.run_dir / "logs" / "rank0.log").read_text()
    assert "step 10/10" in log
    assert "Traceback" not in straight.output


def test_metrics_have_one_object_a_step_with_the_documented_names(straight: Run) -> None:
    lines = straight.metrics
    assert [line["step"] for line in lines] == list(range(1, 11))
    for line in lines:
        assert line.keys() >= METRICS
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, int | float))
        # Two micro batches of 2 sequences of 16 tokens.
        assert (line["num_tokens"], line["micro_num"]) == (64, 2)
        assert line["num_samples_in_batch"] == line["largest_batch"] + line["smallest_batch"]  # documents of two
        assert line["num_consumed_tokens"] == 64 * line["step"]
        assert 0 < line["valid_tokens"] <= 64
        assert line["valid_tokens"] == line["tokens/en"] + line["tokens/cn"] + line["tokens/code"]
        # Both are the mean over all valid tokens, one summed in fp32, one in fp64.
        assert line["loss"] == pytest.approx(line["loss_from_metric"], rel=1e-6)
        assert line["perplexity"] == pytest.approx(math.exp(line["loss_from_metric"]), rel=1e-9)
    assert lines[0]["loss"] == pytest.approx(math.log(61), rel=0.02)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    # Two steps of warm-up to 3e-3, then down a cosine.
    assert [line["lr"] for line in lines[:3]] == [0.0015, 0.003, 0.003]
    assert all(before["lr"] > after["lr"] for before, after in itertools.pairwise(lines[2:]))


def test_tensorboard_has_the_same_numbers(straight: Run) -> None:
    events = EventAccumulator(str(straight.run_dir / "tensorboards"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx([line["loss"] for line in straight.metrics], rel=1e-6)


def test_checkpoints_are_complete_and_carry_the_config(straight: Run) -> None:
    assert steps_in(straight.folder / "checkpoints") == [5, 10]
    last = straight.folder / "checkpoints" / "10"
    assert json.loads((last / "config.json").read_text())["model"]["hidden_size"] == 32
    assert (last / "config_file.py").read_text() == (straight.folder / "config.py").read_text()


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, Run, Run]]:
    """Five steps, the same command again, and then on to ten."""
    folder = tmp_path_factory.mktemp("parts")
    write_config(folder)
    first = train(folder, "--set", "data.total_steps=5")
    again = train(folder, "--set", "data.total_steps=5")
    yield first, again, train(folder, "--set", "data.total_steps=10")


def test_the_same_command_again_has_nothing_to_do(in_parts: tuple[Run, Run, Run]) -> None:
    first, again, _ = in_parts
    assert (first.code, again.code) == (0, 0), first.output + again.output
    assert f"resuming at step 5 of 5 from {first.folder}/checkpoints/5" in again.output
    assert again.output.splitlines()[-1].endswith("nothing to do: the run already has its 5 steps (data.total_steps)")


def test_ten_steps_are_five_and_five_bit_for_bit(straight: Run, in_parts: tuple[Run, Run, Run]) -> None:
    *_, second = in_parts
    assert second.code == 0, second.output
    assert f"resuming at step 5 of 10 from {second.folder}/checkpoints/5" in second.output
    # JSON has every bit of a double, and so of an fp32 loss. One run wrote TensorBoard events, the other did not.
    for key in ("step", "loss", "grad_norm", "lr", "acc", "valid_tokens", "num_consumed_tokens", "tokens/en"):
        assert [line[key] for line in second.metrics] == [line[key] for line in straight.metrics], key


def test_a_run_that_may_not_resume_starts_anew(in_parts: tuple[Run, Run, Run]) -> None:
    folder = in_parts[0].folder
    anew = train(folder, "--set", "ckpt.auto_resume=False", "--set", "data.total_steps=2", run="anew")
    assert anew.code == 0
    assert "starting from scratch (auto_resume is off)" in anew.output
    assert [line["loss"] for line in anew.metrics] == [line["loss"] for line in in_parts[2].metrics[:2]]


def test_a_resumed_run_tells_that_the_data_changed(in_parts: tuple[Run, Run, Run], tmp_path: Path) -> None:
    folder = in_parts[0].folder
    other = train(
        tmp_path, "--set", "data.seed=7", "--set", "data.total_steps=11", "--set", f"ckpt.save_ckpt_folder={tmp_path}",
        "--set", f"ckpt.load_ckpt_info.path={folder}/checkpoints/10", "--set", "ckpt.load_ckpt_info.content=all",
        config=folder / "config.py",
    )  # fmt: skip
    assert other.code == 0, other.output
    assert "starting at step 10 with all loaded from" in other.output
    assert "The order of samples differs from that of the checkpoint (seed was 1024, is 7)" in other.output
    assert [line["step"] for line in other.metrics] == [11]


# -- several ranks ----------------------------------------------------------------------------------------------------


def same_run(ranks: Run, single: Run) -> None:
    """Two ranks with half the micro batches each take the same steps."""
    assert [line["step"] for line in ranks.metrics] == [line["step"] for line in single.metrics]
    for ours, theirs in zip(ranks.metrics, single.metrics, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=SAME_LOSS)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        for key in ("lr", "valid_tokens", "num_tokens", "num_consumed_samples", "num_consumed_tokens", "acc"):
            assert ours[key] == theirs[key], key
        assert (ours["micro_num"], theirs["micro_num"]) == (1, 2)


def test_torchrun_takes_the_same_steps(straight: Run, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    result = as_users_do(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", REPOSITORY / "train.py",
        "--config", config, "--launcher", "torch", "--run-dir", tmp_path / "run", "--set", "data.micro_num=1",
    )  # fmt: skip
    run = Run(tmp_path, tmp_path / "run", result.returncode, result.stdout)
    assert run.code == 0, run.output
    assert "tiny: 2 rank(s) on " in run.output
    same_run(run, straight)
    assert steps_in(tmp_path / "checkpoints") == [5, 10]
    assert {path.name for path in (run.run_dir / "logs").iterdir()} == {"rank0.log", "rank1.log"}


def test_srun_is_recognised_and_takes_the_same_steps(
    straight: Run, in_parts: tuple[Run, Run, Run], tmp_path: Path
) -> None:
    """By its variables, without SLURM's tools; and ZeRO's way to shard changes nothing."""
    config = write_config(tmp_path)
    arguments = ["--config", config, "--run-dir", tmp_path / "run", "--set", "data.micro_num=1"]
    sharding = ["--set", "parallel.zero1.size=1", "--set", "hybrid_zero_optimizer.reduce_bucket_size=1"]
    ranks = start_ranks([*arguments, *sharding], tmp_path, before=lambda rank: os.environ.update(PATH=""))
    assert wait_for_all(ranks) == [0, 0], ranks[0].output + ranks[1].output
    assert "tiny: 2 rank(s) on " in ranks[0].output
    same_run(Run(tmp_path, tmp_path / "run", 0, ranks[0].output), straight)
    # The other ranks are quiet as long as all is well.
    assert ranks[1].output == ""


def test_one_process_goes_on_with_what_two_ranks_saved(straight: Run, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    arguments = ["--config", config, "--run-dir", tmp_path / "run", "--set", "data.total_steps=5"]
    overlap = ["--set", "hybrid_zero_optimizer.overlap_sync_param=True"]
    ranks = start_ranks([*arguments, *overlap, "--set", "data.micro_num=1"], tmp_path)
    assert wait_for_all(ranks) == [0, 0], ranks[0].output + ranks[1].output
    rest = train(tmp_path)
    assert rest.code == 0, rest.output
    assert "resuming at step 5 of 10" in rest.output
    losses = [line["loss"] for line in rest.metrics]
    assert losses == pytest.approx([line["loss"] for line in straight.metrics], rel=1e-5)


# -- options that train nothing ---------------------------------------------------------------------------------------


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Runs the command in an empty working directory, and checks that nothing but the config was in it afterwards."""

    def run(*arguments: object, code: int = 0) -> Run:
        result = train_without_run_dir(tmp_path, *arguments)
        assert result.code == code, result.output
        written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        assert written <= {"config.py", "output.txt", "other.py"}, written
        assert "Traceback" not in result.output
        return result

    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    return run


def train_without_run_dir(folder: Path, *arguments: object) -> Run:
    command = start_training(arguments, folder / "output.txt")
    return Run(folder, folder, command.wait(), command.output)


def test_print_config_shows_values_and_origins(look: Callable[..., Run]) -> None:
    lines = look("--config", "config.py", "--print-config", "--set", "adam.lr=0.5", "--seed", "3").output.splitlines()
    shown = {line.split()[0]: line for line in lines if line.strip()}

    def about(key: str) -> str:
        return next(line for name, line in shown.items() if name.rstrip(":=").endswith(key))

    assert "0.5" in about("lr") and "--set" in about("lr")
    assert re.search(r"\b3\b.*--seed", about("seed"))
    assert re.search(r"32 .*config\.py:14\b", about("hidden_size"))
    assert "default" in about("adam_beta1")


def test_dry_run_shows_layout_and_sizes(look: Callable[..., Run]) -> None:
    text = look("--config", "config.py", "--dry-run").output
    assert re.search(r"tiny: INTERNLM2 on 1 rank", text)
    assert re.search(r"activation +pipeline 1 x ", text)
    # 2 * 61 * 32 for embedding and head; a layer has wqkv 64 * 32, wo 32 * 32, 3 * 56 * 32 and two norms; and one norm.
    total = 2 * 61 * 32 + 2 * (64 * 32 + 32 * 32 + 3 * 56 * 32 + 2 * 32) + 32
    assert re.search(rf"total +{total:,} parameters", text)
    assert "64 tokens per step, 640 in 10 steps" in text
    assert "the config is valid" in text


def test_dry_run_for_more_ranks_than_there_are(look: Callable[..., Run]) -> None:
    text = look("--config", "config.py", "--dry-run", "--world-size", 8, "--set", "parallel.zero1.size=4").output
    assert re.search(r"weight +pipeline 1 x data_replica 2 x zero 4 x ", text)
    assert "512 tokens per step" in text


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_all_mistakes_of_a_config_are_told_at_once(look: Callable[..., Run], tmp_path: Path) -> None:
    config = (tmp_path / "config.py").read_text()
    config = config.replace("hidden_size=32", "hidden_sise=32").replace("seq_len=16", "seq_len=-1")
    (tmp_path / "other.py").write_text(config + "ckpt['checkpoint_every'] = 0\noutput_tf32 = True\n")
    text = look("--config", "other.py", "--set", "adam.lr=fast", code=2).output
    assert re.search(r"other\.py:14: .*model\.hidden_sise.*Did you mean '(model\.)?hidden_size'\?", text)
    assert re.search(r"other\.py:5: .*data\.seq_len", text)
    assert re.search(r"ckpt\.checkpoint_every = 0", text)
    assert re.search(r"output_tf32 = True: tf32 for the head alone is not yet supported", text)
    assert re.search(r"--set: .*adam\.lr", text)
    assert text.startswith("error: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model = dict(\n", r"other\.py:\d: .*(never closed|syntax)"),
        ("x = 1\ny = x / 0\n", r"other\.py:2: .*division by zero"),
        ("from nowhere import x\n", r"other\.py:1: .*nowhere"),
    ],
)
def test_a_config_that_is_no_python_is_told_with_its_line(
    look: Callable[..., Run], tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "other.py").write_text(content)
    assert re.search(message, look("--config", "other.py", code=2).output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.py"], r"nowhere\.py"),
        (["--config", "config.py", "--set", "adam.lr"], r"--set adam\.lr: expected key\.path=value"),
        (["--config", "config.py", "--set", "adam.lrr=1"], r"adam\.lrr.*Did you mean '(adam\.)?lr'\?"),
        (["--config", "config.py", "--set", "model_type=INTERNLM22"], r"INTERNLM22.*Did you mean 'INTERNLM2'\?"),
        (["--config", "config.py", "--set", "model.num_attention_heads=5"], r"num_attention_heads"),
        (["--config", "config.py", "--set", "parallel.zero1.size=3"], r"parallel\.zero1\.size = 3"),
        (["--config", "config.py", "--launcher", "torch"], r"needs the variable RANK"),
        (["--config", "config.py", "--launcher", "slurm"], r"needs the variable SLURM_PROCID"),
        (["--config", "config.py", "--set", "data.skip_batches=5-2"], r"data\.skip_batches = '5-2'"),
        (["--config", "config.py", "--set", "lr_scheduler.type=cosinus"], r"lr_scheduler\.type"),
    ],
)
def test_a_mistake_ends_with_code_2_and_names_its_place(
    look: Callable[..., Run], arguments: list[str], message: str
) -> None:
    text = look(*arguments, code=2).output
    assert re.search(message, text), text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "data.train_folder=nowhere"], r"rank 0 failed in phase 'start': DataError: nowhere: no such folder"),
        (
            ["--set", "ckpt.load_ckpt_info.path=nowhere"],
            r"rank 0 failed in phase 'start': CheckpointError: there is no checkpoint at 'nowhere'",
        ),
    ],
)
def test_a_mistake_found_at_the_start_is_the_last_line_of_the_log(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    write_config(tmp_path)
    run = train(tmp_path, *arguments)
    assert run.code == 2
    assert re.search(message, run.output.splitlines()[-1])
    assert re.search(message, (run.run_dir / "logs" / "rank0.log").read_text().splitlines()[-1])
    assert "Traceback" not in run.output
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "run").write_text("a file")
    run = train(tmp_path)
    assert run.code == 2
    assert re.search(r"the run directory '.*/run' cannot be written: .*give another --run-dir", run.output)
    assert "Traceback" not in run.output
