"""`~` is a home folder wherever a path is read, and never a folder of that name."""

import argparse
import importlib
import re
from pathlib import Path

import pytest

from internlm.cli import COMMANDS
from internlm.utils.errors import ConfigError
from internlm.utils.paths import expand_home, local_path, path_text
from internlm.utils.storage import storage_path

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "home")


def test_what_stands_for_a_home_folder(home):
    assert expand_home("~") == home
    assert expand_home("~/a/~b") == f"{home}/a/~b"
    assert expand_home("local:~/a") == f"local:{home}/a"
    assert expand_home("~root/a") == "/root/a"
    for text in ("", "a/~", "./~x", "/~", "s3://bucket/~/a", "boto3:s3://b.h/~", "memory://~/a", "local:/a", "$HOME/a"):
        assert expand_home(text) == text
    assert local_path("~/a") == Path(home, "a") and path_text("s3://b/~") == "s3://b/~"
    assert str(storage_path("~/a")) == str(storage_path("local:~/a")) == f"{home}/a"


def test_users_without_a_home(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"'~nobody_of_that_name/a': there is no user 'nobody_of_that_name'.*'\./~nob"
    ):
        expand_home("~nobody_of_that_name/a")
    monkeypatch.setenv("HOME", "")
    with pytest.raises(ConfigError, match="'local:~/a': this user has no home folder, and HOME is not set"):
        expand_home("local:~/a")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError("uid")))
    with pytest.raises(argparse.ArgumentTypeError, match="this user has no home folder"):
        local_path("~/a")


def test_no_option_takes_a_path_as_it_is_written():
    sources = [path for folder in ("internlm", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in sources if re.search(r"type=(Path|pathlib\.Path)\b", path.read_text())]


def _actions(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)
        else:
            yield action


def test_every_path_of_every_command_is_expanded():
    """By its argparse type, or, for places that may be in a store, by `storage_path`."""
    unexpanded = []
    for name in COMMANDS:
        parser = argparse.ArgumentParser()
        command = importlib.import_module(f"internlm.commands.{name}")
        command.add_arguments(parser)
        for action in _actions(parser):
            is_path = action.metavar in ("DIR", "PATH", "FILE", "FILE.py", "A", "B")
            if is_path and action.type not in (local_path, path_text):
                assert "storage_path" in Path(command.__file__).read_text()
                unexpanded.append((name, action.dest))
    # Each of these is given to `storage_path` alone.
    assert {name for name, _ in unexpanded} <= {"ckpt", "convert"}
