"""A trained model with its tokenizer: what turns text into tokens, and the model's tokens into text.

Owns what follows from a checkpoint: model, tokenizer, ends of texts, chat template. Generation itself is in
`internlm/apis`, which knows tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from internlm.apis.engine import GenerativeModel
from internlm.checkpoint.data_tokenizer import KnownTokenizer, trained_with
from internlm.config.schema import Config
from internlm.convert.tokenizer_files import generation_eos_ids
from internlm.data.conversations.chat_template import ChatTemplate, load_chat_template
from internlm.data.conversations.row_forms import Message
from internlm.data.tokenize.fingerprint import same_ids, tokenizer_fingerprint
from internlm.data.tokenize.special_tokens import stop_ids
from internlm.data.tokenize.text_tokenizer import TextTokenizer, load_tokenizer
from internlm.eval.endings import with_first
from internlm.serve.answering_model import load_answering_model
from internlm.serve.prompt_images import with_placeholders
from internlm.utils.errors import ConfigError, nearest
from internlm.utils.storage import StoragePath


@dataclass(frozen=True)
class LanguageModel:
    """A model in evaluation mode, and what its checkpoint says about its texts.

    Attributes:
        model: of the checkpoint.
        config: it was trained with.
        tokenizer: of its training data.
        tokenizer_path: file or folder of the tokenizer.
        checkpoint: folder of the weights.
        eos_ids: tokens that end a text.
        device: of the weights.
    """

    model: GenerativeModel
    config: Config
    tokenizer: TextTokenizer
    tokenizer_path: Path
    checkpoint: StoragePath
    eos_ids: tuple[int, ...]
    device: torch.device

    def encode(self, text: str, *, with_bos: bool = False) -> list[int]:
        """The tokens of a text.

        Args:
            text: to encode.
            with_bos: begin with the beginning-of-text token, once if the text spells it.

        Raises:
            ConfigError: the text is empty, or the tokenizer has no beginning-of-text token.
        """
        ids = self.tokenizer.encode_batch([text])[0]
        if with_bos:
            if self.tokenizer.bos_id is None:
                raise ConfigError("--bos: this tokenizer has no beginning-of-text token")
            ids = with_first(self.tokenizer.bos_id, ids)
        if not ids:
            raise ConfigError("the prompt is empty, which only works with --bos")
        return ids

    def chat_template(self, file: Path | None = None) -> ChatTemplate:
        """The chat template of the tokenizer, or that of a file.

        Raises:
            DataError: there is none.
        """
        return load_chat_template(self.tokenizer_path, file)

    def encode_chat(self, template: ChatTemplate, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, up to the header of the next answer.

        Raises:
            DataError: the template refuses the messages.
        """
        text, _ = template.render(messages, None, "the conversation", add_generation_prompt=True)
        return self.tokenizer.encode_batch([text])[0]

    def where_not_finite(self) -> str:
        """Describe the first weight with non-finite values, after the logits had some."""
        assert isinstance(self.model, nn.Module)
        for name, parameter in self.model.named_parameters():
            bad = int((~parameter.isfinite()).sum())
            if bad:
                return f"{bad:,} of the {parameter.numel():,} elements of {name} are inf or NaN"
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return f"all weights are finite, so the activations overflow {dtype}"


def load_language_model(
    path: str,
    *,
    tokenizer_path: Path | None = None,
    is_other_tokenizer: bool = False,
    trust_remote_code: bool = False,
    eos: Sequence[str] = (),
    device: str | None = None,
) -> LanguageModel:
    """Load a checkpoint with its tokenizer.

    Args:
        path: see `load_answering_model`.
        tokenizer_path: file or folder of a tokenizer; None: that of the run.
        is_other_tokenizer: allow a tokenizer that differs from that of the training data.
        trust_remote_code: run the code of a tokenizer that exists only as code.
        eos: ids or spellings of tokens that end a text; empty: the tokenizer's, and those of generation_config.json.
        device: see `choose_device`.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is damaged.
        ConfigError: the model cannot generate text, the tokenizer does not fit, or an argument is invalid.
        DataError: the tokenizer cannot be read.
    """
    chosen = choose_device(device)
    model, config, checkpoint = load_answering_model(path, chosen)
    if config.model.is_reward:
        raise ConfigError(f"{path}: a reward model returns scores and cannot generate text")
    if not isinstance(model, GenerativeModel):
        missing = [name for name in ("logits", "make_cache", "prefills_in_chunks") if not hasattr(model, name)]
        raise ConfigError(
            f"{path}: model type '{config.model_type}' lacks {', '.join(missing)}, which generation needs; see "
            "GenerativeModel in internlm/apis/engine.py"
        )
    where = tokenizer_path or config.data.tokenizer_path
    if where is None:
        raise ConfigError("the run's config has no data.tokenizer_path; give --tokenizer PATH")
    tokenizer = load_tokenizer(where, trust_remote_code=trust_remote_code)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{config.model.vocab_size}; give the --tokenizer that made the training data"
        )
    if not is_other_tokenizer:
        _check_tokenizer(checkpoint, tokenizer, str(where))
    eos_ids = _end_ids(eos, tokenizer, checkpoint, Path(where))
    assert isinstance(model, nn.Module)
    tokenizer = with_placeholders(tokenizer, model, config)
    return LanguageModel(model, config, tokenizer, Path(where), checkpoint, eos_ids, chosen)


def choose_device(name: str | None) -> torch.device:
    """The device of that name; without a name, a GPU if there is one, else the CPU.

    Raises:
        ConfigError: the device is unknown to torch or not available on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from error
    if device.type == "meta":
        raise ConfigError("--device meta: it has no storage to compute with")
    return device


def _check_tokenizer(checkpoint: StoragePath, tokenizer: TextTokenizer, where: str) -> None:
    """Refuse a tokenizer that gives other ids than that of the training data."""
    known = trained_with(checkpoint)
    if known is None:
        return
    given = KnownTokenizer(tokenizer_fingerprint(tokenizer), where, tokenizer.vocab_size)
    if not same_ids(known.fingerprint, given.fingerprint):
        raise ConfigError(
            f"'{checkpoint}' was trained on the ids of another tokenizer: {known.against(given)}. Give that one with "
            "--tokenizer, or use this one anyway with --other-tokenizer"
        )


def _end_ids(
    given: Sequence[str], tokenizer: TextTokenizer, checkpoint: StoragePath, tokenizer_path: Path
) -> tuple[int, ...]:
    """The given tokens that end a text, else the tokenizer's and those of generation configs.

    One may be beside the tokenizer, or in the checkpoint if it descends from an imported folder.
    """
    if given:
        pieces = tokenizer.pieces()
        ids = []
        for name in given:
            if name in pieces and name:
                ids.append(pieces.index(name))
            elif name.isdecimal() and int(name) < tokenizer.vocab_size:
                ids.append(int(name))
            else:
                raise ConfigError(
                    f"--eos {name}: the tokenizer has no such token, and ids end at {tokenizer.vocab_size - 1}"
                    f"{nearest(name, [pieces[id] for id in tokenizer.special_ids])}"
                )
        return tuple(dict.fromkeys(ids))
    folder = tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent
    configured = generation_eos_ids(checkpoint) or stop_ids(folder)
    of_tokenizer = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return tuple(dict.fromkeys((*of_tokenizer, *configured)))
