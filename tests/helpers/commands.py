"""The train command on a tiny config, in forked processes, so that nobody waits for torch's import.

Each is what a launcher would start: its own environment, its own stdout and stderr, its own exit code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

# Before any fork, what the command would import on its way.
import internlm.commands.train  # noqa: F401
from helpers.processes import Forked, free_port
from internlm.cli import main

with torch.device("meta"):
    torch.nn.Embedding(1, 1)  # PyTorch imports a lot for the first random tensor without storage

LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NPROCS", "SLURM_LOCALID",
    "SLURM_STEP_ID", "SLURM_NODELIST", "SLURM_JOB_ID",
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
    # Several ranks may write the same file while others read it: it is there whole or not at all.
    draft = folder / f".{name}.{os.getpid()}"
    draft.write_text(TINY_RUN.replace("{folder}", str(folder)) + more, encoding="utf-8")
    draft.replace(path)
    return path


def slurm_environments(world_size: int) -> list[dict[str, str]]:
    """What srun sets for each task of a step on one machine, and a port of its own."""
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


def start_training(
    arguments: Sequence[object],
    output: Path,
    environment: dict[str, str] | None = None,
    before: Callable[[], Any] | None = None,
    own_group: bool = False,
) -> Forked:
    """`internlm train` with `arguments`.

    Args:
        output: the file for stdout and stderr together.
        environment: the launcher's variables; none of another launcher are left.
        before: called in the process before the command, to set a trap for it.
        own_group: see `Forked`.
    """

    def run() -> int:
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(environment or {})
        if before is not None:
            before()
        return main(["train", *map(str, arguments)])

    return Forked(run, output, own_group)


def start_ranks(
    arguments: Sequence[object],
    folder: Path,
    world_size: int = 2,
    before: Callable[[int], Any] | None = None,
) -> list[Forked]:
    """One process a rank, as srun would start them; outputs are `folder/rank<r>.txt`. `before(rank)` as above."""
    return [
        start_training(
            arguments,
            folder / f"rank{rank}.txt",
            environment,
            None if before is None else (lambda rank=rank: before(rank)),  # type: ignore[misc]
        )
        for rank, environment in enumerate(slurm_environments(world_size))
    ]


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics file."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last_log_line(run_dir: Path, rank: int) -> str:
    """The last line of a rank's log file."""
    return (run_dir / "logs" / f"rank{rank}.log").read_text(encoding="utf-8").splitlines()[-1]
