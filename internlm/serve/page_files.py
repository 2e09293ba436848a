"""The files of the page, read once; they hold nothing of a run, and are served without a key."""

from __future__ import annotations

from pathlib import Path

from fastapi import Response

FOLDER = Path(__file__).parent / "page"

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}

_HEADERS = {
    # Nothing from elsewhere, and no code within the page.
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_files() -> dict[str, Response]:
    """Path of a request -> its answer."""
    answers = {}
    for file in sorted(FOLDER.rglob("*")):
        if file.suffix in _TYPES:
            answers[f"/page/{file.relative_to(FOLDER).as_posix()}"] = Response(
                file.read_bytes(), media_type=_TYPES[file.suffix], headers=_HEADERS
            )
    answers["/"] = answers.pop("/page/index.html")
    return answers
