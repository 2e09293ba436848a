"""A package that is missing, broken or of another version is a reason in words and never an exception."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from internlm.utils.optional_packages import version_of, why_unusable


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    why_unusable.cache_clear()
    yield
    why_unusable.cache_clear()


def _write(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("standin_whole", "function = 1", None),
        ("standin_older", "", "standin_older is installed but has no function"),
        (
            "standin_linked",
            "raise ImportError('libcudart.so.12: cannot open shared object file\\nand more')",
            "standin_linked is installed but broken: ImportError: libcudart.so.12: cannot open shared object file",
        ),
        ("standin_wild", "1 / 0", "standin_wild is installed but broken: ZeroDivisionError: division by zero"),
        (
            "standin_needy",
            "import a_package_that_is_not_there",
            "standin_needy is installed but broken: ModuleNotFoundError: No module named 'a_package_that_is_not_there'",
        ),
    ],
)
def test_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, reason: str | None) -> None:
    _write(tmp_path, name, text)
    monkeypatch.syspath_prepend(tmp_path)
    assert why_unusable(name, "function") == reason


def test_missing_packages_and_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, "standin_with_parts", "")
    monkeypatch.syspath_prepend(tmp_path)
    assert why_unusable("a_package_that_is_not_there.part") == "a_package_that_is_not_there is not installed"
    assert why_unusable("standin_with_parts.part.of_it") == "standin_with_parts.part is not installed"


def test_versions() -> None:
    assert version_of("numpy") is not None
    assert version_of("a-distribution-that-is-not-there") is None
