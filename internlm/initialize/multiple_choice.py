"""Builds the sets of multiple-choice questions of a run from its config."""

from __future__ import annotations

from pathlib import Path

from internlm.config.schema import Config
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.eval.multiple_choice import MultipleChoice, read_questions
from internlm.eval.text_batches import TextBatches
from internlm.utils.paths import expand_home


def build_multiple_choice(config: Config) -> dict[str, MultipleChoice]:
    """The sets of `data.multiple_choice` by name; none if evaluation is off.

    Raises:
        DataError: a file or the tokenizer cannot be read, or a question does not fit.
    """
    data = config.data
    if data.valid_every == 0 or not data.multiple_choice:
        return {}
    assert data.tokenizer_path is not None
    tokenizer = load_tokenizer(data.tokenizer_path)
    prefix_id = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    batches = TextBatches(data.seq_len, data.micro_bsz, data.use_packed_dataset)
    return {
        name: MultipleChoice(read_questions(Path(expand_home(path))), tokenizer.encode_batch, prefix_id, batches)
        for name, path in data.multiple_choice.items()
    }
