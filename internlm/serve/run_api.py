"""The paths of a run: its curves and its layout. They are for the page, and may change with it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import Query

from internlm.serve.requests import RequestError
from internlm.serve.run_folder import RunFolder
from internlm.utils.errors import UserError

MAX_CURVES = 100


class RunApi:
    """Answers what the page asks about a run.

    Args:
        run: its folder; None if the server has none.
    """

    def __init__(self, run: RunFolder | None) -> None:
        self._run = run

    def name(self) -> str | None:
        """The title of the run, if there is one."""
        return None if self._run is None else self._run.name

    async def curves(
        self,
        name: Annotated[list[str], Query(default_factory=list, max_length=MAX_CURVES)],
        version: int | None = None,
        start: int = 0,
    ) -> dict[str, Any]:
        """See `RunFolder.curves`."""
        return await _in_thread(self._folder().curves, name, version, start)

    async def layout(self, rank: int = 0) -> dict[str, Any]:
        """See `RunFolder.layout`."""
        return await _in_thread(self._folder().layout, rank)

    def _folder(self) -> RunFolder:
        if self._run is None:
            raise RequestError("this server shows no run; start it with --run DIR", status=404)
        return self._run


async def _in_thread(function: Any, *arguments: Any) -> dict[str, Any]:
    try:
        return await asyncio.to_thread(function, *arguments)
    except UserError as error:
        raise RequestError(str(error)) from error
