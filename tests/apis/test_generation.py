"""Generation against transformers, on the same weights."""

from __future__ import annotations

import pytest
import torch
from helpers.model import tiny_config, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from internlm.apis.generation import filter_logits, generate
from internlm.utils.errors import ConfigError

PROMPT = 7
NEW = 24


@pytest.fixture(scope="module")
def pair():
    """A Llama of ours and transformers' own, with the same weights; large ones, so that the choices are clear."""
    model = tiny_model("LLAMA2", seed=1, num_kv_attention_heads=2)
    config = tiny_config(num_kv_attention_heads=2)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=2,
            rms_norm_eps=config.layer_norm_epsilon,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    names = {
        "tok_embeddings": "model.embed_tokens",
        "output": "lm_head",
        "norm": "model.norm",
        "attention.w": "self_attn.",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
    }
    state = {}
    for name, value in model.state_dict().items():
        prefix, key = "", name
        if name.startswith("layers."):
            prefix, key = "model." + ".".join(name.split(".")[:2]) + ".", name.split(".", 2)[2]
        if key.startswith("attention.w"):
            key = f"self_attn.{key.split('.')[1].removeprefix('w')}_proj.weight"
        else:
            key = next(names[ours] + key.removeprefix(ours) for ours in names if key.startswith(ours))
        state[prefix + key] = value
    theirs.load_state_dict(state)
    return model, theirs.eval()


def prompts(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(97, (batch, PROMPT), generator=torch.Generator().manual_seed(seed))


def test_greedy_equals_transformers(pair):
    model, theirs = pair
    input_ids = prompts(4)
    expected = theirs.generate(input_ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    ours = generate(model, input_ids, max_new_tokens=NEW)
    assert torch.equal(ours, expected)
    assert len(ours[:, PROMPT:].unique()) > 10  # no dull loop that any two models would agree on


def test_the_cache_changes_nothing(pair):
    model, _ = pair
    tokens = prompts(3)
    for _ in range(NEW):
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            following = model.logits(model(tokens, positions)[:, -1]).argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, following], dim=1)
    assert torch.equal(generate(model, prompts(3), max_new_tokens=NEW), tokens)


def test_end_of_text_equals_transformers(pair):
    model, theirs = pair
    input_ids = prompts(3)
    free = generate(model, input_ids, max_new_tokens=NEW)
    # Two tokens that greedy decoding does produce, so that rows end, at different steps.
    eos = [int(free[0, PROMPT + 3]), int(free[1, PROMPT + 9])]
    expected = theirs.generate(input_ids, max_new_tokens=NEW, do_sample=False, eos_token_id=eos, pad_token_id=eos[0])
    ours = generate(model, input_ids, max_new_tokens=NEW, eos_token_id=eos)
    assert torch.equal(ours, expected)
    alone = generate(model, input_ids[:1], max_new_tokens=NEW, eos_token_id=eos[0])
    first = free[0, PROMPT:].tolist().index(eos[0])
    assert torch.equal(alone, free[:1, : PROMPT + first + 1])  # stops at once, with the end in place


def test_the_last_token_of_the_tokenizer_may_be_chosen_and_none_behind_it(pair):
    model, _ = pair
    free = generate(model, prompts(4), max_new_tokens=NEW)
    last = int(free[:, PROMPT:].max())
    assert torch.equal(generate(model, prompts(4), max_new_tokens=NEW, num_tokens=last + 1), free)
    assert int(generate(model, prompts(4), max_new_tokens=NEW, num_tokens=last)[:, PROMPT:].max()) < last


def test_sampling_equals_transformers_with_the_same_seed(pair):
    model, theirs = pair
    input_ids = prompts(4)
    choices = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    torch.manual_seed(3)
    expected = theirs.generate(input_ids, max_new_tokens=NEW, pad_token_id=0, **choices)
    torch.manual_seed(3)
    assert torch.equal(generate(model, input_ids, max_new_tokens=NEW, **choices), expected)


def test_the_generator_decides(pair):
    model, _ = pair

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, prompts(2), max_new_tokens=NEW, do_sample=True, generator=generator)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_filters_equal_transformers(temperature, top_k, top_p):
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(5)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(filter_logits(logits, temperature, top_k, top_p), expected)


def test_tokens_stream_as_they_come(pair):
    model, _ = pair
    seen = []
    result = generate(model, prompts(2), max_new_tokens=5, on_token=seen.append)
    assert torch.equal(torch.stack(seen, dim=1), result[:, PROMPT:])


def test_the_model_is_left_in_its_mode(pair):
    model, _ = pair
    for mode in (True, False):
        model.train(mode)
        result = generate(model, prompts(1), max_new_tokens=1)
        assert model.training is mode and not result.requires_grad


def test_mistakes_are_told_at_once(pair):
    model, _ = pair
    with pytest.raises(ConfigError) as error:
        generate(model, prompts(1), max_new_tokens=0, do_sample=True, temperature=0.0, top_k=-1, top_p=0.0)
    assert len(error.value.mistakes) == 4
    with pytest.raises(ConfigError, match="input_ids"):
        generate(model, prompts(1)[0], max_new_tokens=1)
    with pytest.raises(ConfigError, match="greedy"):
        generate(model, prompts(1), max_new_tokens=1, temperature=0.7)
