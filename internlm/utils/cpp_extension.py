"""Compilation of C++ against PyTorch, cached per user, sources and version of PyTorch.

Does not use `torch.utils.cpp_extension`: it needs setuptools and ninja at run time, and its lock outlives a process
that is killed while compiling, so that all later ones wait forever.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from internlm.utils.logging import get_logger
from internlm.utils.user_cache import user_cache

_log = get_logger(__name__)


class CompileError(Exception):
    """The sources could not be compiled, for the reason in the message."""


def cpp_compilers() -> tuple[str, ...]:
    """Commands to try as C++ compiler, in order of preference; only $CXX where it is set."""
    return (os.environ["CXX"],) if os.environ.get("CXX") else ("g++", "clang++")


def cpp_compiler() -> str | None:
    """The first of `cpp_compilers` that is installed."""
    return next((name for name in cpp_compilers() if shutil.which(name)), None)


def compile_library(folder: Path, flags: Sequence[str]) -> Path:
    """Compile the sources of a folder into a shared library linked to PyTorch, or find it in the cache.

    Concurrent processes compile it once; the others wait.

    Args:
        folder: contains `*.cpp` and the `*.h` that they include; the library gets its name.
        flags: compiler flags in addition to those that PyTorch's headers need.

    Raises:
        CompileError: there is no compiler, compilation fails, or the library cannot be written.
    """
    compiler = cpp_compiler()
    if compiler is None:
        raise CompileError(f"no C++ compiler was found ({' or '.join(cpp_compilers())})")
    sources = sorted(folder.glob("*.cpp"))
    torch_folder = Path(torch.__file__).parent
    options = ["-std=c++20", "-O3", "-shared", "-fPIC", "-fopenmp", *flags]
    options.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    command = [
        *(compiler, *options),
        # The headers of PyTorch cause warnings.
        *("-w", "-isystem", str(torch_folder / "include")),
        *("-isystem", str(torch_folder / "include/torch/csrc/api/include")),
        *(*map(str, sources), "-L", str(torch_folder / "lib"), "-ltorch_cpu", "-lc10"),
    ]
    texts = [path.read_bytes() for path in (*sources, *sorted(folder.glob("*.h")))]
    key = hashlib.sha256(repr((torch.__version__, compiler, options, texts)).encode()).hexdigest()[:16]
    library = user_cache() / "native" / f"{folder.name}-{key}.so"
    # The file appears atomically. A cache that another user has filled need not be writable.
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with library.with_suffix(".lock").open("w") as lock:
            # The system releases it when its holder ends, even if killed.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _log.info("Compiling %s with %s, once for this machine", folder.name, compiler)
                _compile(command, library)
    except OSError as error:
        raise CompileError(f"{library}: {error.strerror or error}; XDG_CACHE_HOME names another folder") from error
    return library


def _compile(command: Sequence[str], library: Path) -> None:
    unfinished = library.with_suffix(f".{os.getpid()}.tmp")
    try:
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        if done.returncode != 0:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
            raise CompileError(f"{command[0]} ended with code {done.returncode}: {reason}")
        os.replace(unfinished, library)
    finally:
        unfinished.unlink(missing_ok=True)
