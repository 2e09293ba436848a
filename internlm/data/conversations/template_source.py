"""Changes the Jinja source of a chat template, so that what it renders is known exactly and does not change.

Macros in front of the source replace what transformers' renderer provides: its positions of {% generation %} blocks
are wrong where their text is not emitted at once (in a macro, or a block that is assigned or filtered), and its
`strftime_now` returns another text every day.
"""

from __future__ import annotations

import re
from datetime import datetime

_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_CLOCK = "strftime_now"
TEMPLATE_DATE = datetime(2024, 7, 26)
"""What `strftime_now` returns: the date that the templates of Llama 3.1 and 3.2 write without a clock."""
_DATE_CODES = ("-d", "-m", "-H", "-I", "-M", "-S", "-j", "-y", *"aAbBcdDeFhHIjmMpRSTuUVwWxXyYG")
_OPEN, _CLOSE = "\x00<answer>\x00", "\x00</answer>\x00"
"""Around a marked text. No white space, which filters strip, and no text of any dataset."""
_MARK = "internlm_marked_answer"


def has_marks(source: str) -> bool:
    """Whether a template marks the answers with {% generation %}."""
    return _GENERATION.search(source) is not None


def reads_clock(source: str) -> bool:
    """Whether a template writes the date or time at which it is rendered."""
    return _CLOCK in source


def with_fixed_clock(source: str) -> str:
    """A template that writes `TEMPLATE_DATE` in place of the present time, on one line more."""
    values = {f"%{code}": TEMPLATE_DATE.strftime(f"%{code}") for code in _DATE_CODES} | {"%%": "%"}
    filters = "".join(f" | replace({code!r}, {value!r})" for code, value in values.items())
    # The line end after a block tag is not rendered.
    return f"{{% macro {_CLOCK}(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{source}"


def with_visible_marks(source: str) -> str:
    """A template that renders a text around what it marks, to be read by `split_marks`."""

    def call(found: re.Match[str]) -> str:
        tag = "endcall" if found[2] else f"call {_MARK}()"
        return f"{{%{found[1]} {tag} {found[3]}%}}"

    macro = f"{{% macro {_MARK}() %}}{{{{ {_OPEN!r} + caller() + {_CLOSE!r} }}}}{{% endmacro %}}\n"
    return macro + _GENERATION.sub(call, source)


def split_marks(text: str) -> tuple[str, list[tuple[int, int]]] | None:
    """Separate what `with_visible_marks` has rendered.

    Returns:
        The text without marks, and the (start, end) characters of what is marked, the outermost marks alone; None if
        the marks are incomplete.
    """
    plain, spans, depth, start = "", list[tuple[int, int]](), 0, 0
    for part in re.split(f"({_OPEN}|{_CLOSE})", text):
        if part == _OPEN:
            start = start if depth else len(plain)
            depth += 1
        elif part == _CLOSE:
            depth -= 1
            if depth < 0:
                return None
            if depth == 0:
                spans.append((start, len(plain)))
        else:
            plain += part
    return None if depth else (plain, spans)
