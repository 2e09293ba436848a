"""How threads wait is chosen before torch is there, unless the user has chosen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from internlm.utils.openmp import set_spin_count, waiting_of_threads


@pytest.mark.parametrize(
    ("given", "expected", "text"),
    [
        ({}, {"GOMP_SPINCOUNT": "3000"}, "OpenMP threads wait by GOMP_SPINCOUNT = 3000"),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}, "OpenMP threads wait by GOMP_SPINCOUNT = 7"),
        (
            {"OMP_WAIT_POLICY": "active"},
            {"OMP_WAIT_POLICY": "active"},
            "OpenMP threads wait by OMP_WAIT_POLICY = active",
        ),
    ],
)
def test_what_the_user_has_set_wins(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: dict[str, str], text: str
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    set_spin_count(given)
    assert given == expected
    assert waiting_of_threads(given) == text


def test_not_when_torch_has_read_it() -> None:
    assert "torch" in sys.modules
    environment: dict[str, str] = {}
    set_spin_count(environment)
    assert environment == {}
    assert waiting_of_threads(environment) == "OpenMP threads wait by default"


def test_the_command_chooses_before_it_imports_torch() -> None:
    script = """
import os, sys
from internlm import cli
cli.importlib.import_module = lambda name: sys.exit(f"{os.environ['GOMP_SPINCOUNT']} {'torch' in sys.modules}")
cli.main(["train"])
"""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stderr.strip() == "3000 False"
