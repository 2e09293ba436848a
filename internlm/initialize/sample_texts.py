"""Builds the hook that continues fixed prompts, from a config."""

from __future__ import annotations

from internlm.config.schema import Config
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.eval.sample_texts import SampleTextsHook
from internlm.eval.text_batches import TextBatches
from internlm.utils.errors import ConfigError


def build_sample_texts(config: Config) -> SampleTextsHook:
    """The hook of `data.generate_every`, which the rules have checked.

    Raises:
        ConfigError: a prompt has no token, or is too long.
        DataError: the tokenizer cannot be read.
    """
    data = config.data
    assert data.tokenizer_path is not None
    tokenizer = load_tokenizer(data.tokenizer_path)
    prompt_ids = tokenizer.encode_batch(list(data.generate_prompts))
    for number, (prompt, ids) in enumerate(zip(data.generate_prompts, prompt_ids, strict=True)):
        if not ids:
            raise ConfigError(f"data.generate_prompts[{number}] = {prompt!r} has no token; leave it out")
        if len(ids) + data.generate_max_new_tokens > data.seq_len:
            raise ConfigError(
                f"data.generate_prompts[{number}] has {len(ids)} tokens, which are with data.generate_max_new_tokens = "
                f"{data.generate_max_new_tokens} more than data.seq_len = {data.seq_len}; shorten it, or lower that"
            )
    return SampleTextsHook(
        data.generate_every,
        data.generate_prompts,
        prompt_ids,
        max_new_tokens=data.generate_max_new_tokens,
        num_tokens=min(tokenizer.vocab_size, config.model.vocab_size),
        eos_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
        decode=tokenizer.decode,
        batches=TextBatches(data.seq_len, data.micro_bsz, data.use_packed_dataset),
    )
