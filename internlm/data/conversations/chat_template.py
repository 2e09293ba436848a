"""Renders conversations with the chat template of a tokenizer, by the renderer of transformers.

Owns loading and choosing templates, and their errors. Must not know tokens or losses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm.data.conversations.row_forms import Message
from internlm.data.conversations.template_source import (
    TEMPLATE_DATE,
    has_marks,
    reads_clock,
    split_marks,
    with_fixed_clock,
    with_visible_marks,
)
from internlm.data.tokenize.text_tokenizer import check_code
from internlm.utils.errors import DataError
from internlm.utils.logging import get_logger

_RENDERING = 2
"""Version of how marks are found and the date is written; part of the fingerprint of templates that have some."""

logger = get_logger(__name__)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, with the special tokens that it may name.

    Attributes:
        source: the Jinja text of the template.
        tools_source: the Jinja text of the template for conversations with tools; `source` if there is only one.
        special_tokens: name -> token, such as "bos_token" -> "<s>".
        name: file or folder of the template, for errors.
    """

    source: str
    tools_source: str
    special_tokens: dict[str, Any]
    name: str

    @property
    def fingerprint(self) -> str:
        """Hash of everything that changes a rendered text."""
        sources = (self.source, self.tools_source)
        content = repr((*sources, sorted(self.special_tokens.items())))
        if any(has_marks(source) or reads_clock(source) for source in sources):
            content += repr(_RENDERING)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def has_marks(self, tools: object) -> bool:
        """Whether the template marks the answers with {% generation %}."""
        return has_marks(self._source_for(tools))

    def render(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        place: str,
        *,
        add_generation_prompt: bool = False,
        with_marks: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render messages; returns the text and the character spans that the template marks as generated.

        Args:
            messages: the messages.
            tools: JSON schemas of the tools; None without tools.
            place: file and position of the row, for errors.
            add_generation_prompt: whether to end with the header of an assistant message.
            with_marks: whether to return the marked spans; without, the list is empty.

        Raises:
            DataError: the template refuses the messages, or ignores tools or tool calls; names the place.
        """
        source = self._source_for(tools)
        has_calls = any("tool_calls" in message for message in messages)
        for is_needed, word in ((bool(tools), "tools"), (has_calls, "tool_calls")):
            if is_needed and word not in source:
                raise DataError(
                    f"{place} has {word}, which the chat template of {self.name} does not render: name a template that "
                    "does (--chat-template), or remove the row"
                )
        text = self._render(source, messages, tools, place, add_generation_prompt)
        if not with_marks:
            return text, []
        found = split_marks(self._render(with_visible_marks(source), messages, tools, place, add_generation_prompt))
        if found is None or found[0] != text:
            raise DataError(
                f"{place}: the chat template of {self.name} changes the text that {{% generation %}} marks after the "
                "mark, so its place is not known: move the marks out of what is filtered, or use mask = 'prefix' "
                "(--mask prefix)"
            )
        return found

    def _render(
        self,
        source: str,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        place: str,
        add_generation_prompt: bool,
    ) -> str:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        num_added_lines = 0
        if reads_clock(source):
            source, num_added_lines = with_fixed_clock(source), 1
        try:
            # Annotated as returning a string, but it returns a pair of lists.
            render: Any = render_jinja_template
            texts, _ = render(
                [list(messages)],
                tools=tools,
                chat_template=source,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except TemplateError as error:
            lineno = getattr(error, "lineno", None)
            at = f", line {lineno - num_added_lines}" if lineno else ""
            raise DataError(f"{place}: the chat template of {self.name}{at} refuses the row: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise DataError(f"{place}: the chat template of {self.name} fails for the row: {error!r}") from error
        return str(texts[0])

    def _source_for(self, tools: object) -> str:
        return self.tools_source if tools else self.source


def load_chat_template(
    tokenizer_path: Path, template_file: Path | None = None, *, trust_remote_code: bool = False
) -> ChatTemplate:
    """Load the chat template of a tokenizer.

    Args:
        tokenizer_path: a Hugging Face folder, or a tokenizer file in one.
        template_file: a file with another template; None takes that of the tokenizer.
        trust_remote_code: whether to run custom code of the tokenizer folder.

    Raises:
        DataError: the tokenizer has no template, or a file is missing or unreadable.
    """
    template = _load(tokenizer_path, template_file, trust_remote_code)
    if reads_clock(template.source) or reads_clock(template.tools_source):
        logger.info(
            "the chat template of %s writes today's date: it is %s in every row, so that ids do not depend on the day",
            template.name, TEMPLATE_DATE.strftime("%d %B %Y"),
        )  # fmt: skip
    return template


def _load(tokenizer_path: Path, template_file: Path | None, trust_remote_code: bool) -> ChatTemplate:
    from transformers import AutoTokenizer

    folder = tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent
    check_code(folder, trust_remote_code)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError) as error:
        raise DataError(f"{folder}: a chat template needs a Hugging Face tokenizer folder: {error}") from error
    special_tokens = dict(tokenizer.special_tokens_map)
    if template_file is not None:
        try:
            source = template_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{template_file}: the chat template cannot be read: {error}") from error
        return ChatTemplate(source, source, special_tokens, str(template_file))
    templates: Any = tokenizer.chat_template
    if isinstance(templates, dict):
        templates = {str(name): str(source) for name, source in templates.items()}
        if "default" not in templates:
            raise DataError(
                f"{folder}: none of the chat templates {sorted(templates)} is named 'default': write the one to use to "
                "a file and name that (--chat-template FILE)"
            )
        return ChatTemplate(
            templates["default"], str(templates.get("tool_use", templates["default"])), special_tokens, str(folder)
        )
    if not templates:
        raise DataError(
            f"{folder}: the tokenizer has no chat template: put a chat_template.jinja into the folder, or name a file "
            "with a template (--chat-template FILE)"
        )
    return ChatTemplate(templates, templates, special_tokens, str(folder))
