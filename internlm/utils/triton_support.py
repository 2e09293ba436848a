"""Whether Triton's kernels can run: PyTorch for GPUs installs it, but it needs a C compiler at run time."""

from __future__ import annotations

import functools

import torch

from internlm.utils.optional_packages import why_unusable


@functools.cache
def why_no_triton(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on this device; None if they can. Compiles and runs one, once per process."""
    if device.type != "cuda":
        return f"Triton's kernels need a GPU, this is {device.type}"
    if (reason := why_unusable("triton")) is not None:
        return reason
    from internlm.utils.triton_trial import run_trial

    try:
        run_trial(device)
    except Exception as error:
        first_line = str(error).strip().split("\n", maxsplit=1)[0]
        return f"a trial kernel of Triton failed: {type(error).__name__}: {first_line}"
    return None
