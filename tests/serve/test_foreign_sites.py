"""What a server without a key refuses, by the address at which a request arrives and the headers that it has."""

from __future__ import annotations

import socket

import pytest
from fastapi import Request

from internlm.serve.foreign_sites import refuse_foreign_sites
from internlm.serve.requests import RequestError


def is_refused(address: str | None, **headers: str) -> bool:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    server = None if address is None else (address, 8000)
    try:
        refuse_foreign_sites(Request({"type": "http", "headers": pairs, "server": server}))
    except RequestError as error:
        assert error.status == 403
        return True
    return False


@pytest.mark.parametrize(
    ("address", "is_own"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        # What an IPv4 connection to a server on "::" arrives at.
        ("::ffff:127.0.0.1", True),
        ("192.0.2.7", False),
        ("2001:db8::7", False),
        ("::ffff:192.0.2.7", False),
        (None, False),
    ],
)
def test_names_of_the_internet_are_refused_at_the_addresses_of_this_machine_only(
    address: str | None, is_own: bool
) -> None:
    assert is_refused(address, host="models.example:8000") is is_own
    assert is_refused(address, host="localhost", sec_fetch_site="cross-site")
    assert not is_refused(address, host="localhost:8000")


def test_names_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Node7.cluster.example")
    for host in ("node7.cluster.example", "NODE7.cluster.example.:8000", "Runs.LocalHost.", "localhost.", "[::1]", ""):
        assert not is_refused("127.0.0.1", host=host), host
    for host in ("node8.cluster.example", "x.node7.cluster.example", "a.notlocalhost", "1.2.3"):
        assert is_refused("127.0.0.1", host=host), host
