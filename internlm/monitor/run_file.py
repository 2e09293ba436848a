"""`run.json`: what a run was started with, so that its folder can be shown without the config file.

Written when the run starts. An object with the `job_name`, the `world_size` and the checked `config`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from internlm.config.schema import Config
from internlm.utils.errors import DataError

FILE_NAME = "run.json"


@dataclass(frozen=True)
class StartedRun:
    """The content of the file.

    Attributes:
        config: checked.
        world_size: number of ranks.
    """

    config: Config
    world_size: int


def write_run_file(run_dir: Path, run: StartedRun) -> None:
    """Write the file, in place of that of an earlier start.

    Raises:
        OSError: it cannot be written.
    """
    values = {
        "job_name": run.config.JOB_NAME,
        "world_size": run.world_size,
        "config": run.config.model_dump(mode="json"),
    }
    draft = run_dir / f".{FILE_NAME}.{os.getpid()}"
    try:
        draft.write_text(json.dumps(values, indent=1), encoding="utf-8")
        draft.replace(run_dir / FILE_NAME)
    finally:
        draft.unlink(missing_ok=True)


def read_run_file(run_dir: Path) -> StartedRun:
    """Read the file.

    Raises:
        DataError: it is absent, cannot be read, or is something else.
    """
    path = run_dir / FILE_NAME
    try:
        values = json.loads(path.read_bytes())
        return StartedRun(Config.model_validate(values["config"]), int(values["world_size"]))
    except FileNotFoundError:
        raise DataError(f"'{path}' does not exist; a run of this version writes it when it starts") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"{error.error_count()} keys are wrong" if isinstance(error, ValidationError) else repr(error)
        raise DataError(f"'{path}' cannot be read: {reason}") from error
