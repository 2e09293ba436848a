"""The keys of conversations, in the data section, sources of a blend and validation sets."""

from __future__ import annotations

from typing import Literal

from internlm.config.schema.base import PathText, Section, key


class ConversationConfig(Section):
    """Conversations, tokenized with the chat template; only the answers contribute loss."""

    form: Literal["messages", "sharegpt", "alpaca", "prompt_response", "prompt_completion"] | None = key(
        None, "Form of the rows; None: told by the columns of each row."
    )
    learn: Literal["all", "last"] = key("all", "Answers that contribute loss: all, or the last one.")
    mask: Literal["auto", "marks", "prefix"] = key(
        "auto",
        "How answers are found: `marks` of the template ({% generation %}), exact difference of `prefix`es; `auto`: "
        "marks if the template has them.",
    )
    chat_template: PathText = key(None, "File with a chat template; None: that of data.tokenizer_path.")
