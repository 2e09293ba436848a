"""`internlm train`, also available as `train.py`: runs a training from the command line."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from internlm.commands.config_options import add_config_options
from internlm.config.loader import LoadedConfig, load_config
from internlm.config.print_config import format_config
from internlm.config.schema import CkptConfig, Config
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.context.random import seed_everything
from internlm.core.failure import ECHO, FailureWatch
from internlm.core.progress.record import Progress
from internlm.core.progress.stall_watch import BACKSTOP_SECONDS, StallWatch
from internlm.core.trainer import Trainer
from internlm.initialize.build import build_layout, build_trainer, check_buildable, set_numerics
from internlm.initialize.cpu_gemm import agree_on_cpu_gemm
from internlm.initialize.data_checks import check_data
from internlm.initialize.launch import (
    LAUNCHERS,
    Launch,
    LaunchError,
    choose_device,
    collective_timeout,
    connect,
    detect_launch,
    disconnect,
)
from internlm.initialize.preflight import check_surroundings, rehearse_start, why_not_writable
from internlm.initialize.stages import build_meta_model
from internlm.model.ops.implementations import OpSettings, describe
from internlm.monitor.run_file import StartedRun, write_run_file
from internlm.utils.errors import ConfigError, UserError, user_message
from internlm.utils.logging import configure_logging, get_logger
from internlm.utils.openmp import waiting_of_threads
from internlm.utils.paths import local_path
from internlm.utils.storage import full_disk
from internlm.utils.triton_support import why_no_triton

logger = get_logger(__name__)


_LAUNCHER_OPTIONS: dict[str, type] = {"--host": str, "--rank": int, "--local-rank": int}
_TOPOLOGY_OPTIONS = ("--enable-ali-topology", "--disable-volc-topology")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config_options(parser)
    parser.add_argument("--launcher", choices=LAUNCHERS, help="how the ranks were started (default: detected)")
    parser.add_argument("--port", type=int, help="rendezvous port under srun (default: MASTER_PORT, or 8888)")
    parser.add_argument("--seed", type=int, help="seed of the weights; same as --set seed=N")
    parser.add_argument("--backend", help="backend of collectives (default: nccl on GPUs, gloo on CPUs)")
    parser.add_argument("--profiling", action="store_true", help="write a torch profile of an early step")
    parser.add_argument(
        "--run-dir", type=local_path, metavar="DIR", help="folder for logs and metrics (default: RUN/<job>/<time>)"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print every key, its value and its origin, and exit"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the config and the files it refers to, print layout and sizes, and exit",
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="with --dry-run or --print-config: assume N ranks")
    for name, kind in _LAUNCHER_OPTIONS.items():
        # Options of InternEvo; torch.distributed.launch adds the last one.
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    for name in _TOPOLOGY_OPTIONS:
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    launch = detect_launch(options.launcher, options.port)
    configure_logging(launch.rank)
    if options.world_size is not None and (options.dry_run or options.print_config):
        if options.world_size < 1:
            raise LaunchError(f"--world-size {options.world_size}: the number of ranks must be at least 1")
        launch = replace(launch, world_size=options.world_size)
    values = {"--seed": {"seed": options.seed}} if options.seed is not None else {}
    loaded = load_config(options.config, options.overrides, world_size=launch.world_size, options=values)
    loaded = replace(loaded, notices=[*loaded.notices, *_ignored_options(options, launch)])
    if options.print_config:
        if launch.rank == 0:
            print(format_config(loaded))
        return 0
    check_buildable(loaded.config, launch.world_size)
    if options.dry_run:
        if launch.rank == 0:
            print(_dry_run(loaded, launch, options.run_dir))
        return 0
    return _train(loaded, launch, options)


def _ignored_options(options: argparse.Namespace, launch: Launch) -> Iterator[str]:
    """One notice for each option that was given but has no effect."""
    launcher = {"none": "", "torch": "torchrun", "slurm": "srun"}[launch.launcher]
    values = {name: getattr(options, name[2:].replace("-", "_")) for name in _LAUNCHER_OPTIONS}
    if launch.launcher != "slurm":
        values["--port"] = options.port
    if not (options.dry_run or options.print_config):
        values["--world-size"] = options.world_size
    here = f"rank {launch.rank} of {launch.world_size} at {launch.host}:{launch.port}, as {launcher} chose"
    reason = here if launch.launcher != "none" else "one process without a launcher; torchrun and srun start more"
    for name, value in values.items():
        if value is not None:
            yield f"no effect: {name} {value} (this is {reason})"
    for name in _TOPOLOGY_OPTIONS:
        if getattr(options, name[2:].replace("-", "_")):
            yield f"no effect: {name} (ranks are numbered as the launcher numbers them)"


def _dry_run(loaded: LoadedConfig, launch: Launch, run_dir: Path | None) -> str:
    """Report the layout, sizes and notices of a run.

    Raises:
        UserError: the run would fail at its start.
    """
    config = loaded.config
    layout = build_layout(config, launch.world_size)
    context = ParallelContext(layout, launch.rank, choose_device(launch))
    _check_run_dir(run_dir)
    notices = [*loaded.notices, *check_surroundings(config, context), *rehearse_start(config, context)]
    sizes: dict[str, int] = {}
    for name, parameter in build_meta_model(config).named_parameters():
        part = name.split(".")[0]
        sizes[part] = sizes.get(part, 0) + parameter.numel()
    tokens = config.data.packed_length * config.data.micro_num * layout.data_size
    lines = [
        f"{config.JOB_NAME}: {config.model_type} on {launch.world_size} rank(s)",
        layout.describe(),
        *(f"{part:<16} {size:>16,} parameters" for part, size in sizes.items()),
        f"{'total':<16} {sum(sizes.values()):>16,} parameters",
        f"{tokens:,} tokens per step, {tokens * config.data.total_steps:,} in {config.data.total_steps:,} steps",
        *check_data(config, context),
        *(f"notice: {notice}" for notice in notices),
        "the config is valid",
    ]
    return "\n".join(lines)


def _train(loaded: LoadedConfig, launch: Launch, options: argparse.Namespace) -> int:
    config = loaded.config
    device = choose_device(launch)
    timeout, timeout_notice = collective_timeout(config.monitor.collective_timeout_seconds)
    connect(launch, device, options.backend, timeout + BACKSTOP_SECONDS)
    progress = Progress()
    with (
        _signals_outside_the_loop(),
        FailureWatch(launch.rank, launch.world_size) as watch,
        StallWatch(
            launch.rank,
            launch.world_size,
            progress,
            watch,
            slow_seconds=config.monitor.slow_step_seconds,
            stuck_seconds=timeout,
            store_holder=None if launch.launcher == "torch" else 0,
        ) as stall_watch,
    ):
        try:
            run_dir = _agree_on_run_dir(options.run_dir, config.JOB_NAME)
            _open_log(run_dir, launch.rank)
            stall_watch.start(run_dir / "logs" / f"rank{launch.rank}.stacks")
            for notice in (*loaded.notices, *([timeout_notice] if timeout_notice else [])):
                logger.info("%s", notice)
            layout = build_layout(config, launch.world_size)
            _check_surroundings(config, ParallelContext(layout, launch.rank, device))
            seed_everything(config.seed)
            set_numerics(config)
            context = ParallelContext.create(layout, device, timeout + BACKSTOP_SECONDS)
            progress.num_collectives = context.num_collectives
            agree_on_cpu_gemm(config.model.torch_dtype, context)
            _announce(config, context, run_dir)
            if context.is_main_rank:
                _write_run_file(run_dir, StartedRun(config, context.world_size))
            trainer = build_trainer(
                config,
                context,
                run_dir,
                config_text=_source_of(options.config),
                profiling=options.profiling,
                progress=progress,
            )
            if trainer.state.step >= trainer.total_steps:
                logger.info("nothing to do: the run already has its %d steps (data.total_steps)", trainer.total_steps)
            else:
                trainer.fit()
                _log_end(trainer, config.ckpt)
            with progress.announce("end of the run"):
                disconnect(context)
        except BaseException as failure:
            error = full_disk(failure) or failure
            # A launcher terminates all ranks once one has failed; the others must still log the cause.
            _ignore_sigterm()
            cause = watch.report(error, str(progress))
            # The echo of another rank's failure needs no details, and a user error no traceback.
            if not cause.startswith(ECHO):
                _log_details(error, launch.rank)
            logger.error("%s", cause)
            if isinstance(error, KeyboardInterrupt):
                return 143 if isinstance(error, Terminated) else 130
            return 2 if user_message(error) is not None else 1
    return 0


def _source_of(config_file: Path) -> str:
    """The text of a config file, decoded as its coding declaration says."""
    with tokenize.open(config_file) as file:
        return file.read()


class Terminated(KeyboardInterrupt):
    """SIGTERM outside the training loop; inside it leads to a clean stop."""


@contextmanager
def _signals_outside_the_loop() -> Iterator[None]:
    """Treat SIGTERM as a failure, which is logged and shared with the other ranks, and ignore requests to save.

    There is nothing to save yet, and the default action of those signals ends the process.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated("received SIGTERM")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[signal.Signals, Any] = {
        signal.SIGTERM: terminate,
        signal.SIGUSR1: signal.SIG_IGN,
        signal.SIGUSR2: signal.SIG_IGN,
    }
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ignore_sigterm() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _log_details(error: BaseException, rank: int) -> None:
    """Log the traceback of an unexpected error, or the full text of a user error of several lines."""
    if user_message(error) is None and not isinstance(error, KeyboardInterrupt):
        logger.error("rank %d failed", rank, exc_info=error)
    elif "\n" in str(error):
        logger.error("%s", error)


def _agree_on_run_dir(chosen: Path | None, job_name: str) -> Path:
    """The run directory, equal on every rank; collective."""
    run_dir = [str(chosen or Path("RUN") / job_name / time.strftime("%Y-%m-%d_%H-%M-%S"))]
    if dist.is_initialized():
        dist.broadcast_object_list(run_dir, src=0)
    return Path(run_dir[0])


def _check_surroundings(config: Config, context: ParallelContext) -> None:
    """Check the surroundings on the main rank and raise its error on every rank; collective."""
    found: list[UserError | None] = [None]
    if context.is_main_rank:
        try:
            for notice in check_surroundings(config, context):
                logger.info("%s", notice)
        except UserError as error:
            found = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    if found[0] is not None:
        raise found[0]


def _check_run_dir(chosen: Path | None) -> None:
    run_dir = chosen or Path("RUN")
    reason = why_not_writable(run_dir)
    if reason is not None:
        raise ConfigError(f"the run directory '{run_dir}' cannot be written: {reason}; give another --run-dir")


def _open_log(run_dir: Path, rank: int) -> None:
    try:
        configure_logging(rank, run_dir / "logs" / f"rank{rank}.log")
    except OSError as error:
        raise ConfigError(f"the run directory '{run_dir}' cannot be written: {error}; give another --run-dir") from None


def _write_run_file(run_dir: Path, run: StartedRun) -> None:
    """Write what describes the run; a full disk does not end it, as it does not for the metrics."""
    try:
        write_run_file(run_dir, run)
    except OSError as error:
        logger.warning("%s; the page of this run will have no layout", full_disk(error) or error)


def _announce(config: Config, context: ParallelContext, run_dir: Path) -> None:
    logger.info(
        "%s: %d rank(s) on %s, torch %s, Python %s; run directory %s",
        config.JOB_NAME,
        context.world_size,
        context.device.type,
        torch.__version__,
        sys.version.split()[0],
        run_dir,
    )
    if context.device.type == "cpu":
        logger.info("%d thread(s) per rank; %s", torch.get_num_threads(), waiting_of_threads())
    settings = OpSettings.of(config.model, use_float8=config.float8.enable_float8_linear)
    for operation, choice in describe(context.device, settings).items():
        logger.info("%s: %s (%s)", operation, choice.implementation, choice.reason)
    if context.device.type == "cuda":
        problem = why_no_triton(context.device)
        logger.info("own Triton kernels: %s", "used" if problem is None else f"PyTorch's instead ({problem})")


def _log_end(trainer: Trainer, ckpt: CkptConfig) -> None:
    step, reason = trainer.state.step, trainer.stop_reason
    if reason is None:
        logger.info("done: %d steps, %d tokens", step, trainer.state.num_consumed_tokens)
        return
    if trainer.checkpointer is None:
        advice = "nothing was saved, as ckpt.enable_save_ckpt is False"
    elif not ckpt.auto_resume:
        advice = "the checkpoint was saved; to resume from it, set ckpt.auto_resume = True"
    else:
        advice = "run the same command to resume"
    logger.warning("stopped at step %d: %s; %s", step, reason, advice)
