"""Where a server listens, and the key that its requests must have."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

import pytest

from internlm.commands.server_options import KEY_VARIABLE, api_key, bind
from internlm.utils.errors import ConfigError


def options(host: str = "127.0.0.1", port: int = 0, key_file: Path | None = None) -> argparse.Namespace:
    return argparse.Namespace(host=host, port=port, api_key_file=key_file)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_in_use_is_named_before_anything_is_loaded(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: .* another program listens there; give another --port"):
            bind(options(host, port))


@pytest.mark.parametrize("host", ["192.0.2.1", "a..b", "x" * 70, "[::1]"])
def test_a_host_of_another_machine_is_refused_with_the_reason(host: str) -> None:
    with pytest.raises(ConfigError, match=r"--host .*must be an address or a name of this machine"):
        bind(options(host))


def test_an_empty_host_does_not_mean_all_addresses() -> None:
    with pytest.raises(ConfigError, match="--host: must not be empty"):
        bind(options(""))


@pytest.mark.parametrize(
    ("key", "message"), [("", "is empty"), (" \n", "is empty"), ("a\nb", "one line"), ("ä", "ASCII")]
)
def test_a_key_that_protects_nothing_or_cannot_be_sent_is_refused(
    key: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ConfigError, match=f"{KEY_VARIABLE}: .*{message}"):
        api_key(options(), "use it")
    file = tmp_path / "key"
    file.write_text(key, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"--api-key-file .*key: .*{message}"):
        api_key(options(key_file=file), "use it")


def test_a_key_comes_from_the_file_else_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert api_key(options(), "use it") is None
    monkeypatch.setenv(KEY_VARIABLE, "one")
    assert api_key(options(), "use it") == "one"
    file = tmp_path / "key"
    file.write_text("two\n")
    assert api_key(options(key_file=file), "use it") == "two"
