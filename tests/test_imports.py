"""`import internlm` and its ops need torch and numpy alone."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

from helpers.pages import ROOT

OPTIONAL = {"triton", "liger_kernel", "flash_attn", "flash_attn_interface", "torchao", "apex", "transformer_engine"}

PROGRAM = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ImportError(f"{{name}} is imported")

sys.meta_path.insert(0, Refuse())
import internlm
import internlm.cli
import internlm.model.ops.self_test
assert "internlm.utils.internevo_names" not in sys.modules
"""


def test_nothing_but_torch_and_numpy_is_needed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for group in project["optional-dependencies"].values() for name in group]
    names = {re.split(r"[\[<>=]", name)[0].replace("-", "_") for name in (*project["dependencies"], *extras)}
    refused = (names | OPTIONAL) - {"torch", "numpy"}
    assert {"pydantic", "rich", "transformers"} <= refused
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(names=refused)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
