"""Detects the launcher of this process and joins the job's process group.

Three launchers are supported: none (one process), torchrun (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)
and srun (SLURM_*).
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

# Its functions bind the default group as a default argument at import. If torch imported it after `connect`, with the
# first optimizer, it would keep that group and its threads alive beyond `disconnect`.
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
    """The launcher's environment is incomplete, or the ranks cannot reach each other."""


@dataclass(frozen=True)
class Launch:
    """How this process was launched.

    Attributes:
        launcher: "none", "torch" or "slurm".
        rank: number of this process, in [0, world_size).
        world_size: number of processes of the job.
        local_rank: number of this process on its machine; selects the GPU.
        host: host of the rendezvous.
        port: port of the rendezvous.
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
        launcher: one of LAUNCHERS; None detects it from the environment (torchrun before srun, since torchrun may run
            inside an srun allocation).
        port: of the rendezvous under srun; None takes MASTER_PORT, or 8888. Ignored under torchrun, which has chosen
            one already.
        environment: the environment variables.

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
            f"launcher '{launcher}' needs the variable {name}, which is not set; start with `{start}`, or omit "
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
    """The first host of a SLURM node list such as `node[03-05,9],other1`; used where scontrol is not installed."""
    # Take the text up to the first comma outside brackets, and of each bracket the number before a comma or a dash.
    entry = re.match(r"(?:[^\[,]|\[[^\]]*\])*", node_list)
    host = re.sub(r"\[(\d*)[^\]]*\]", r"\1", entry.group()) if entry else ""
    if not host or host.isdigit():
        raise LaunchError(f"SLURM_NODELIST = '{node_list}' names no host; set MASTER_ADDR")
    return host


def choose_device(launch: Launch) -> torch.device:
    """The device of this rank: `cuda:<local rank>`, the only GPU visible to a SLURM task, or the CPU without GPUs.

    Raises:
        LaunchError: this machine has more ranks than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if launch.launcher == "slurm" and torch.cuda.device_count() == 1:
        # srun --gpus-per-task=1 makes only its own GPU visible to each task.
        return torch.device("cuda", 0)
    if launch.local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"local rank {launch.local_rank} has no GPU: {torch.cuda.device_count()} are visible on this machine; "
            f"start at most that many ranks on it, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    return torch.device("cuda", launch.local_rank)


def connect(launch: Launch, device: torch.device, backend: str | None = None, timeout_seconds: float = 1800.0) -> None:
    """Join the process group of the job; does nothing in a job of one process.

    Args:
        launch: from `detect_launch`.
        device: from `choose_device`.
        backend: for tensors on `device`; default nccl on cuda, gloo on the CPU. Host tensors always use gloo.
        timeout_seconds: timeout of one collective.

    Raises:
        LaunchError: the rendezvous failed.
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
            f"rank {launch.rank} of {launch.world_size} could not connect to the others at "
            f"{launch.host}:{launch.port}: {error}; check that the host is reachable and the port free (--port)"
        ) from error


def collective_timeout(
    configured: float | None, environment: Mapping[str, str] = os.environ
) -> tuple[float, str | None]:
    """Timeout of a collective.

    Args:
        configured: `monitor.collective_timeout_seconds`; None takes InternEvo's, which depends on the environment.
        environment: INTERNLM_ENABLE_TIMEOUT, with any value, selects NCCL_TIMEOUT seconds, by default 60.

    Returns:
        The timeout in seconds, and a notice about the variable if it is set.

    Raises:
        LaunchError: NCCL_TIMEOUT is not a number above 0.
    """
    variable, key = "INTERNLM_ENABLE_TIMEOUT", "monitor.collective_timeout_seconds"
    if variable not in environment:
        return configured or 1800.0, None
    if configured is not None:
        return configured, f"{variable} is ignored: {key} = {configured:g} is set"
    text = environment.get("NCCL_TIMEOUT", "60")
    if not text.isdecimal() or int(text) == 0:
        raise LaunchError(f"{variable} is set, and NCCL_TIMEOUT = '{text}' is not a whole number of seconds above 0")
    notice = f"{variable} is set: {key} = {text}; InternEvo's timeouts of single functions are not implemented"
    return float(text), notice


def disconnect(context: ParallelContext | None = None) -> None:
    """Leave the process group together with all other ranks; does nothing outside one. Not for use after a failure.

    Args:
        context: its groups are released too. A group's threads end with its last reference; a thread that is still
            alive at interpreter exit and frees a tensor aborts the process.
    """
    if dist.is_initialized():
        # A barrier: one rank hosts the store that the others still read.
        dist.all_reduce(torch.zeros(()))
        if context is not None:
            context.close()
        dist.destroy_process_group()
