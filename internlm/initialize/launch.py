"""How this process was started, and its connection to the others.

Three launchers: none (one process), torchrun (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and srun
(SLURM_*).
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Its functions take the default group as a default argument when it is imported. Imported after `connect` (by torch
# itself, with the first optimizer) it would keep that group, and its threads, beyond `disconnect`.
import torch.distributed.nn

from internlm.core.context.parallel_context import ParallelContext
from internlm.utils.errors import UserError
from internlm.utils.former_names import explain_former_names
from internlm.utils.logging import get_logger

explain_former_names(__name__)

logger = get_logger(__name__)

LAUNCHERS = ("none", "torch", "slurm")
DEFAULT_PORT = 8888


class LaunchError(UserError):
    """The environment of the launcher is incomplete, or the ranks cannot reach each other."""


@dataclass(frozen=True)
class Launch:
    """This process among all.

    Attributes:
        launcher: "none", "torch" or "slurm".
        rank, world_size: its number, and how many there are.
        local_rank: its number on this machine, which chooses the GPU.
        host, port: where the ranks meet.
    """

    launcher: str = "none"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT


def detect_launch(
    launcher: str | None = None, port: int | None = None, environment: Mapping[str, str] = os.environ
) -> Launch:
    """Read the launcher's variables.

    Args:
        launcher: one of LAUNCHERS; None recognises it from the environment (torchrun before srun, since torchrun may
            run inside an srun allocation).
        port: where the ranks of srun meet; None takes MASTER_PORT, or 8888. torchrun has chosen its own already.

    Raises:
        LaunchError: a variable of the launcher is missing or not a number.
    """
    if launcher is None:
        if "RANK" in environment and "WORLD_SIZE" in environment:
            launcher = "torch"
        # An interactive shell inside an allocation has SLURM_JOB_ID but no rank of its own.
        elif "SLURM_PROCID" in environment and "SLURM_NPROCS" in environment and "SLURM_STEP_ID" in environment:
            launcher = "slurm"
        else:
            launcher = "none"
    if launcher == "none":
        return Launch()
    if launcher == "torch":
        return Launch(
            "torch",
            rank=_integer(environment, "RANK", launcher),
            world_size=_integer(environment, "WORLD_SIZE", launcher),
            local_rank=_integer(environment, "LOCAL_RANK", launcher),
            host=_text(environment, "MASTER_ADDR", launcher),
            port=_integer(environment, "MASTER_PORT", launcher),
        )
    if launcher == "slurm":
        if port is None:
            port = _integer({"MASTER_PORT": str(DEFAULT_PORT), **environment}, "MASTER_PORT", launcher)
        return Launch(
            "slurm",
            rank=_integer(environment, "SLURM_PROCID", launcher),
            world_size=_integer(environment, "SLURM_NPROCS", launcher),
            local_rank=_integer(environment, "SLURM_LOCALID", launcher),
            host=environment.get("MASTER_ADDR") or _first_host(environment),
            port=port,
        )
    raise LaunchError(f"unknown launcher '{launcher}'; allowed: {', '.join(LAUNCHERS)}")


def _text(environment: Mapping[str, str], name: str, launcher: str) -> str:
    if name not in environment:
        start = "torchrun --nproc_per_node=N train.py ..." if launcher == "torch" else "srun python train.py ..."
        raise LaunchError(
            f"launcher '{launcher}' needs the variable {name}, which is not set; start with `{start}`, or leave out "
            f"--launcher to run one process"
        )
    return environment[name]


def _integer(environment: Mapping[str, str], name: str, launcher: str) -> int:
    text = _text(environment, name, launcher)
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"launcher '{launcher}': {name} = '{text}' is not a number") from None


def _first_host(environment: Mapping[str, str]) -> str:
    node_list = _text(environment, "SLURM_NODELIST", "slurm")
    try:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        hosts = []
    return hosts[0] if hosts else first_host_of(node_list)


def first_host_of(node_list: str) -> str:
    """The first host of a SLURM node list such as `node[03-05,9],other1`, for where scontrol is not installed."""
    # Up to the first comma outside of brackets; of each bracket, the number before a comma or a dash.
    entry = re.match(r"(?:[^\[,]|\[[^\]]*\])*", node_list)
    host = re.sub(r"\[(\d*)[^\]]*\]", r"\1", entry.group()) if entry else ""
    if not host or host.isdigit():
        raise LaunchError(f"SLURM_NODELIST = '{node_list}' names no host; set MASTER_ADDR")
    return host


def choose_device(launch: Launch) -> torch.device:
    """The accelerator of this rank: a GPU when there is one, else the CPU.

    It is `cuda:<local rank>`, or the only GPU that a SLURM task sees.

    Raises:
        LaunchError: more ranks than GPUs on this machine.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if launch.launcher == "slurm" and torch.cuda.device_count() == 1:
        # srun --gpus-per-task=1 shows each task its own GPU only.
        return torch.device("cuda", 0)
    if launch.local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"local rank {launch.local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; start at most "
            f"that many ranks on it, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    return torch.device("cuda", launch.local_rank)


def connect(launch: Launch, device: torch.device, backend: str | None = None, timeout_seconds: float = 1800.0) -> None:
    """Join the process group of the job; with one process there is none to join.

    Args:
        launch: from `detect_launch`.
        device: from `choose_device`.
        backend: for tensors on `device`; default nccl on cuda, gloo on the CPU. Host tensors always travel by gloo.
        timeout_seconds: of one collective.

    Raises:
        LaunchError: the ranks cannot meet.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.world_size == 1:
        return
    if device.type == "cuda":
        backend = f"cpu:gloo,cuda:{backend or 'nccl'}"
    elif backend not in (None, "gloo"):
        logger.warning("backend '%s' needs a GPU; using gloo on the CPU", backend)
        backend = "gloo"
    try:
        dist.init_process_group(
            backend or "gloo",
            init_method=f"tcp://{launch.host}:{launch.port}" if launch.launcher != "torch" else "env://",
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise LaunchError(
            f"rank {launch.rank} of {launch.world_size} could not meet the others at {launch.host}:{launch.port}: "
            f"{error}; check that the host is reachable and the port free (--port)"
        ) from error


def collective_timeout(
    configured: float | None, environment: Mapping[str, str] = os.environ
) -> tuple[float, str | None]:
    """Seconds that a rank waits for another one, and what is to be said of it.

    Args:
        configured: `monitor.collective_timeout_seconds`; None takes InternEvo's, which depends on the environment.
        environment: INTERNLM_ENABLE_TIMEOUT, with any value, asks for a minute, or for NCCL_TIMEOUT seconds.

    Raises:
        LaunchError: NCCL_TIMEOUT is not a number above 0.
    """
    variable, key = "INTERNLM_ENABLE_TIMEOUT", "monitor.collective_timeout_seconds"
    if variable not in environment:
        return configured or 1800.0, None
    if configured is not None:
        return configured, f"{variable} is ignored: {key} = {configured:g} is given"
    text = environment.get("NCCL_TIMEOUT", "60")
    if not text.isdecimal() or int(text) == 0:
        raise LaunchError(f"{variable} is set, and NCCL_TIMEOUT = '{text}' is not a whole number of seconds above 0")
    notice = f"{variable} is set: {key} = {text}; InternEvo's further time limits, function by function, do not exist"
    return float(text), notice


def disconnect(context: ParallelContext | None = None) -> None:
    """Leave the process group, if this process is in one, together with all others; not for use after a failure.

    Args:
        context: whose groups to give back too. The threads of a group end when nobody holds it; one that is still there
            when the interpreter ends, and lets go of a tensor, aborts the process.
    """
    if dist.is_initialized():
        # Nobody leaves early: one rank holds the store that the others still look into.
        dist.all_reduce(torch.zeros(()))
        if context is not None:
            context.close()
        dist.destroy_process_group()
