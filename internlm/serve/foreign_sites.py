"""Refuses what pages of other sites make their visitor's browser ask of a server without a key.

Such a page reaches the servers of the visitor's machine in two ways: it sends them requests, which the browser marks as
those of another site (https://www.w3.org/TR/fetch-metadata/), or it has its own name resolve to 127.0.0.1 (DNS
rebinding), and then the name in the Host header tells. With a key neither works, as the page does not have it.
"""

from __future__ import annotations

import ipaddress
import socket

from fastapi import Request

from internlm.serve.requests import RequestError


def refuse_foreign_sites(request: Request) -> None:
    """Refuse a request that a page of another site made.

    Raises:
        RequestError: with status 403.
    """
    if request.headers.get("sec-fetch-site") == "cross-site":
        raise RequestError("requests from pages of other sites need a key: start the server with one", status=403)
    name = _host_name(request.headers.get("host", ""))
    if _is_loopback(request.scope["server"]) and not _is_local_name(name):
        raise RequestError(
            f"the Host header names '{name[:100]}', and without a key this server answers on its own machine to "
            "localhost, addresses and names without a dot only; use one of them, or start the server with a key",
            status=403,
        )


def _host_name(host: str) -> str:
    """The name or address in a Host header."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.strip().lower().rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_local_name(name: str) -> bool:
    """Whether nobody on the internet can have a name resolve to an address of their choice."""
    return _is_address(name) or "." not in name or name.endswith(".localhost") or name == socket.gethostname().lower()


def _is_loopback(server: tuple[str, int | None] | None) -> bool:
    """Whether the address at which a connection arrived is of this machine only."""
    if server is None or not _is_address(server[0]):
        return False
    address = ipaddress.ip_address(server[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
