"""Runs of the train command in processes of their own, forked from this one, so that nobody waits for torch's import.

Each is what the launcher would start: its own environment, its own stdout and stderr, its own exit code.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NPROCS", "SLURM_LOCALID",
    "SLURM_STEP_ID", "SLURM_NODELIST", "SLURM_JOB_ID", "TORCHELASTIC_USE_AGENT_STORE",
)  # fmt: skip

TINY_RUN = """
JOB_NAME = "tiny"
model_type = "INTERNLM2"
data = dict(
    seq_len=16,
    micro_bsz=2,
    micro_num=2,
    total_steps=10,
    num_worker=0,
    fixed_random_dataset_seqlen=False,
)
model = dict(
    vocab_size=61,
    hidden_size=32,
    num_layers=2,
    num_attention_heads=4,
    num_kv_attention_heads=2,
    intermediate_size=56,
    dtype="torch.float32",
)
adam = dict(lr=3e-3)
lr_scheduler = dict(total_steps=10, warmup_ratio=0.2)
hybrid_zero_optimizer = dict(clip_grad_norm=1.0)
ckpt = dict(save_ckpt_folder="{folder}/checkpoints", checkpoint_every=5)
# Importing TensorBoard takes longer than the whole run.
enable_tb = False
"""


def write_config(folder: Path, more: str = "", name: str = "config.py") -> Path:
    """The config of a tiny run on dummy data whose checkpoints go into `folder`; `more` is added at its end."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(TINY_RUN.replace("{folder}", str(folder)) + more, encoding="utf-8")
    return path


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def slurm_environments(world_size: int) -> list[dict[str, str]]:
    """What srun sets for each task of a step on one machine."""
    port = str(free_port())
    return [
        {
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_ID": "0",
            "SLURM_NODELIST": "localhost",
            "SLURM_NPROCS": str(world_size),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "MASTER_PORT": port,
        }
        for rank in range(world_size)
    ]


class Command:
    """One running process of `internlm train`.

    Args:
        arguments: after `internlm train`.
        output: the file for stdout and stderr together.
        environment: the launcher's variables; none of another launcher are left.
        before: called in the process before the command, to set a trap for it.
        own_group: give the process a group of its own, as a shell does, so that a signal can go to all of it.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        output: Path,
        environment: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
        own_group: bool = False,
    ) -> None:
        self.output_file = output
        output.parent.mkdir(parents=True, exist_ok=True)
        words = ["train", *map(str, arguments)]
        fork = multiprocessing.get_context("fork")
        self.process: Any = fork.Process(target=_run, args=(words, output, environment or {}, before, own_group))
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        """All that it printed so far."""
        return self.output_file.read_text(encoding="utf-8") if self.output_file.exists() else ""

    def wait(self, timeout: float = 60.0) -> int:
        """Its exit code (-9 when killed by signal 9); it is killed when it takes longer than `timeout` seconds."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"the command did not end within {timeout} s; its output:\n{self.output}")
        return self.process.exitcode

    def wait_until(self, condition: Callable[[], bool], timeout: float = 60.0) -> None:
        """Wait for something that this process does."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.exitcode is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"what the test waits for did not happen; the output:\n{self.output}")
            time.sleep(0.01)

    def send(self, number: signal.Signals, group: bool = False) -> None:
        """Send a signal to the process, or to its whole group."""
        (os.killpg if group else os.kill)(self.pid, number)

    def kill(self) -> None:
        """End it at once, if it still runs."""
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()


def _run(
    words: list[str],
    output: Path,
    environment: dict[str, str],
    before: Callable[[], None] | None,
    own_group: bool,
) -> None:
    if own_group:
        os.setpgid(0, 0)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (it serves until the process ends)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(environment)
    from internlm.cli import main

    if before is not None:
        before()
    sys.exit(main(words))


def run_all(commands: Sequence[Command], timeout: float = 60.0) -> list[int]:
    """The exit codes of all; all are killed when one takes too long."""
    try:
        return [command.wait(timeout) for command in commands]
    finally:
        for command in commands:
            command.kill()
