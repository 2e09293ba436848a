"""Which layouts a class of transformers allows: one row of a table, from runs of a small copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from internlm.config.schema import Config
from internlm.initialize.hf_class_checks import TOLERANCE, ClassDifferences
from internlm.utils.errors import ConfigError
from internlm.verify.report import Verdict

LAYOUTS: Mapping[str, str] = {
    "isp": "tensor=2,mode=isp,weight=2",
    "FSDP": "fsdp",
    "mtp": "tensor=2,mode=mtp",
    "pipeline": "pipeline=2",
    "context": "context=2",
}
"""Column of the table -> layout on two ranks."""

HEADER = f"| class | own logits | packed | {' | '.join(LAYOUTS)} |\n|---|---|---|{'---|' * len(LAYOUTS)}"


@dataclass
class ClassRow:
    """What a class does.

    Attributes:
        name: of the class.
        differences: of its logits, in parts of the largest.
        layouts: column -> "equal", "different" or "refused".
        reasons: one line for each column that is not "equal".
    """

    name: str
    differences: ClassDifferences
    layouts: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def add(self, column: str, run: Callable[[], Verdict]) -> None:
        """Run a layout and note its result; a `ConfigError` is a refusal."""
        try:
            verdict = run()
        except ConfigError as error:
            self.layouts[column] = "refused"
            self.reasons.append(f"{column}: {error}")
            return
        self.layouts[column] = "equal" if verdict.is_equal else "different"
        if not verdict.is_equal:
            self.reasons.append(f"{column}: {verdict.explain()}")

    @property
    def is_right(self) -> bool:
        """Whether the class computes its own logits, and no layout another result."""
        return self.differences.separate <= TOLERANCE and "different" not in self.layouts.values()

    def __str__(self) -> str:
        own, packed = (
            "equal" if difference <= TOLERANCE else f"{difference:.0e}" for difference in self.differences[:2]
        )
        return f"| {self.name} | {own} | {packed} | {' | '.join(self.layouts[column] for column in LAYOUTS)} |"


def config_text(folder: Path, *, packed: bool) -> str:
    """A config file that trains the class of a folder.

    Args:
        folder: with config.json.
        packed: whether documents are packed.
    """
    return (
        f'model_type = "hf"\nhf = dict(folder={str(folder)!r})\nmodel = dict(dtype="torch.float32")\n'
        f"data = dict(seq_len=32, micro_bsz=1, total_steps=1, use_packed_dataset={packed})\n"
        "ckpt = dict(enable_save_ckpt=False)\n"
    )


def class_name(config: Config) -> str:
    """The name of the class that a config names."""
    assert config.model.hf_class is not None
    return str(config.model.hf_class["model_class"].rpartition(".")[2])
