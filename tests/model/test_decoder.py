"""The decoder on its own: documents, checkpointing, cache, dtypes, initial values, keys no published family has."""

from __future__ import annotations

import fnmatch
import math
from typing import Any

import pytest
import torch
from helpers.model import DECODERS, tiny_config, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.model.initialization import Uniform, initializer_of
from internlm.model.modules.cache import CachedRows, KeyValueCache
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.registry import build_model
from internlm.model.roles import Role
from internlm.utils.errors import UserError

GQA = {"num_kv_attention_heads": 2}


def _ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


def _positions(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def _gradients(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model.logits(model(**inputs)).float().square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("model_type", ["INTERNLM2", "QWEN3", "MISTRAL"])
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_no_leak_between_documents(model_type: str, dtype: str) -> None:
    model = tiny_model(model_type, dtype=dtype, sliding_window=5, **GQA)
    lengths = (30, 17, 30)
    ids = _ids(1, 77)
    others = torch.cat((_ids(1, 30, seed=1), ids[:, 30:]), dim=1)
    first, second = (model.logits(model(x, _positions(*lengths), VarlenMetadata.of(lengths))) for x in (ids, others))
    assert torch.equal(first[:, 30:], second[:, 30:])
    assert not torch.equal(first[:, :30], second[:, :30])


@pytest.mark.parametrize("model_type", ["INTERNLM2", "QWEN2", "GEMMA", "MISTRAL"])
@pytest.mark.parametrize("rope", [None, {"type": "dynamic", "factor": 2.0}])
def test_cache_gives_what_the_whole_sequence_gives(model_type: str, rope: dict[str, Any] | None) -> None:
    window = {"sliding_window": 6, "max_window_layers": 1, "use_sliding_window": True}
    model = tiny_model(model_type, rope_scaling=rope, **window, **GQA)
    ids, positions = _ids(3, 20), torch.arange(20).expand(3, -1)
    with torch.no_grad():
        whole = model(ids, positions)
        cache = model.make_cache(num_rows=3, max_length=20)
        pieces = []
        for start, stop in ((0, 9), (9, 10), (10, 11), (11, 15), (15, 20)):
            pieces.append(model(ids[:, start:stop], positions[:, start:stop], cache=cache.rows()))
            assert cache.lengths == [stop] * 3
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


def test_a_cache_without_room_says_what_needs_less() -> None:
    """A Hugging Face folder may allow texts of a million tokens. A pebibyte is more than processes can address."""
    with pytest.raises(UserError, match=r"cpu has no room .* 8 texts of 1,048,576 tokens, 1,048,576\.0 GiB: .*--batch"):
        KeyValueCache(8192, 8, 1 << 20, 64, 64, torch.bfloat16, value_dim=64)


def test_rows_of_a_cache_grow_move_and_refuse_what_has_no_room() -> None:
    cache = KeyValueCache(1, 2, 3, 1, 2, torch.float32)
    k = torch.arange(8.0).view(2, 2, 1, 2)

    def append(rows: CachedRows, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = rows.update(0, keys, values)
        rows.advance(keys.shape[1])
        return found

    append(cache.rows(), k, -k)
    cache.reorder(torch.tensor([1, 1]))
    cache.truncate(1, 1)
    assert cache.lengths == [2, 1]
    rows = cache.rows()
    assert rows.position_ids(1).tolist() == [[2], [1]]
    mask, windowed = rows.mask(1, None), rows.mask(1, 1)
    assert mask is not None and mask[:, 0, 0].tolist() == [[True, True, True], [True, True, False]]
    assert windowed is not None and windowed[:, 0, 0].tolist() == [[False, False, True], [False, True, False]]
    keys, values = append(rows, k[:, :1] + 100, k[:, :1])
    assert torch.equal(keys[0, :, 0], torch.cat((k[1, :, 0], k[0, :1, 0] + 100)))
    assert torch.equal(keys[1, :2, 0], torch.cat((k[1, :1, 0], k[1, :1, 0] + 100)))
    assert torch.equal(values[0, :2], -k[1])
    cache.copy_row(1, 0)
    assert cache.lengths == [2, 2] and cache.rows().mask(1, None) is None
    assert torch.equal(append(cache.rows(0, 1), k[:1, :1], k[:1, :1])[0][0, :2], keys[1, :2])
    with pytest.raises(ValueError, match="room for 3 tokens, not for 4"):
        cache.rows().update(0, k[:, :1], k[:, :1])


@pytest.mark.parametrize(("fraction", "layers"), [(True, 4), (0.6, 2), (0.2, 0)])
def test_checkpointing_changes_no_bit(fraction: float, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {**GQA, "num_layers": 4}
    plain, sparing = tiny_model("INTERNLM2", **keys), tiny_model("INTERNLM2", checkpoint=fraction, **keys)
    inputs = {"inputs": _ids(1, 25), "position_ids": _positions(15, 10), "varlen": VarlenMetadata.of((15, 10))}
    calls = []
    for i, layer in enumerate(sparing.layers.values()):
        layer.ffn_norm.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    expected, grads = _gradients(plain, **inputs), _gradients(sparing, **inputs)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)
    assert sorted(calls) == sorted([*range(4), *range(layers)])
    calls.clear()
    with torch.no_grad():
        sparing(**inputs)
    assert calls == [0, 1, 2, 3]


@pytest.mark.parametrize("model_type", DECODERS)
def test_fused_and_separate_weights_are_one_function(model_type: str) -> None:
    from internlm.model.huggingface.weight_names import from_hf, to_hf

    keys = {**GQA, "num_layers": 1}
    separate = tiny_model(model_type, enable_qkv_fusion=False, mlp_layer_fusion=False, norm_head=False, **keys)
    fused = tiny_model(model_type, seed=1, enable_qkv_fusion=True, mlp_layer_fusion=True, norm_head=False, **keys)
    fused.load_state_dict(from_hf(to_hf(separate.state_dict(), separate.architecture), fused.architecture))
    ids = _ids(2, 9)
    positions = torch.arange(9).expand(2, -1)
    torch.testing.assert_close(fused(ids, positions), separate(ids, positions))


@pytest.mark.parametrize("model_type", DECODERS)
def test_is_built_without_storage(model_type: str) -> None:
    with torch.device("meta"):
        model = build_model(model_type, tiny_config(model_type, **GQA))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
    for parameter in model.parameters():
        initializer_of(parameter)


def test_layers_that_predict_later_tokens_are_like_the_last_layer() -> None:
    """Its window and experts, where the first layer has none of them."""
    keys = {"num_experts": 4, "moe_type": "Dropless", "first_k_dense_replace": 1, "num_nextn_predict_layers": 2}
    window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    a = tiny_model("QWEN3MOE", **keys, **window, **GQA).architecture.with_multi_token_layers
    assert a.windows == (None, 5, 5, 5)
    assert sorted(a.layer_kinds) == a.layers_with_experts == [1, 2, 3]
    last_dense = tiny_model("QWEN3MOE", **keys | {"first_k_dense_replace": 0}, mlp_only_layers=[1]).architecture
    assert sorted(last_dense.with_multi_token_layers.layer_kinds) == last_dense.layers_with_experts == [0]


@pytest.mark.parametrize("fused", [True, False])
def test_every_weight_has_its_role(fused: bool) -> None:
    model = tiny_model("QWEN3", enable_qkv_fusion=fused, mlp_layer_fusion=fused, **GQA)
    roles = {}
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            matches = [role for pattern, role in model.roles.items() if fnmatch.fnmatchcase(name, pattern)]
            assert len(matches) <= 1
            roles[name] = matches[0] if matches else Role.REPLICATED
    assert {name for name, role in roles.items() if role is Role.REPLICATED} == {
        name for name in roles if name.split(".")[-1] in ("norm", "attention_norm", "ffn_norm")
    }
    assert roles["layers.1.attention.q_norm"] is roles["layers.0.attention.k_norm"] is Role.PER_HEAD
    assert roles["tok_embeddings"] is Role.EMBEDDING and roles["output"] is Role.HEAD
    assert roles["layers.1.attention.wo"] is Role.ATTENTION_OUT
    assert roles["layers.0.feed_forward.w2"] is Role.ROW
    if fused:
        assert roles["layers.0.attention.wqkv"] is Role.ATTENTION_QKV
        assert roles["layers.0.feed_forward.w13"] is Role.COLUMN_PAIR


def test_head_with_normalised_rows() -> None:
    """Its gradient is the one through the normalisation, and its length does not matter."""
    model = tiny_model("BAICHUAN2", norm_head=True)
    hidden = model(_ids(1, 8), _positions(8)).detach()
    weight = model.output.weight.detach().clone().requires_grad_()
    expected = hidden @ (weight / weight.norm(dim=1, keepdim=True)).t()
    torch.testing.assert_close(model.logits(hidden), expected)
    torch.testing.assert_close(
        torch.autograd.grad(model.logits(hidden).square().sum(), model.output.weight),
        torch.autograd.grad(expected.square().sum(), weight),
    )
    with torch.no_grad():
        model.output.weight.mul_(3)
    torch.testing.assert_close(model.logits(hidden), expected)


def test_reward_head() -> None:
    model = tiny_model("INTERNLM2", is_reward=True)
    assert model.output.weight.shape == (1, 48)
    assert model.logits(model(_ids(2, 5), torch.arange(5).expand(2, -1))).shape == (2, 5, 1)


def test_embedding_gradient_is_scaled_alone() -> None:
    inputs = {"inputs": _ids(1, 12), "position_ids": _positions(12)}
    plain = _gradients(tiny_model("LLAMA2"), **inputs)
    scaled = _gradients(tiny_model("LLAMA2", embed_grad_scale=0.25), **inputs)
    for name, grad in plain.items():
        torch.testing.assert_close(scaled[name], grad * 0.25 if name == "tok_embeddings.weight" else grad)


def test_norms_and_residual_stream_in_fp32() -> None:
    """Both keep bits: the result is nearer to the fp32 model's than with everything in bf16."""
    inputs = (_ids(4, 30), torch.arange(30).expand(4, -1))
    keys = {**GQA, "num_layers": 8}
    exact = tiny_model("INTERNLM2", **keys)
    errors = []
    for fp32 in (False, True):
        model = tiny_model(
            "INTERNLM2",
            norm_dtype=torch.float32 if fp32 else None,
            dtype="torch.bfloat16",
            residual_in_fp32=fp32,
            **keys,
        )
        model.load_state_dict(exact.state_dict())
        assert model.layers["0"].attention_norm.weight.dtype == (torch.float32 if fp32 else torch.bfloat16)
        assert model.layers["0"].attention.wqkv.weight.dtype == torch.bfloat16
        hidden = model(*inputs)
        assert hidden.dtype == torch.bfloat16
        model.logits(hidden).sum().backward()
        errors.append((hidden.float() - exact(*inputs)).norm().item())
    assert errors[1] < 0.9 * errors[0]


def test_layernorm_and_rope_in_the_models_dtype() -> None:
    model = tiny_model("INTERNLM2", norm_type="layernorm", dtype="torch.bfloat16", use_fp32_rope=False)
    assert {"norm.bias", "layers.1.ffn_norm.bias"} <= dict(model.named_parameters()).keys()
    hidden = model(_ids(1, 9), _positions(9)).float()
    # LayerNorm's mark: every token's features have mean 0 (each rounded to 8 bits).
    assert hidden.mean(-1).abs().max() < 2**-8
    exact = tiny_model("INTERNLM2", norm_type="layernorm")
    exact.load_state_dict(model.state_dict())
    exact_hidden = exact(_ids(1, 9), _positions(9))
    assert (hidden - exact_hidden).norm() < 0.05 * exact_hidden.norm()


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_initial_values(distribution: str, scaled: bool) -> None:
    stds = {
        "embedding_init_std": 0.01,
        "attn_wqkv_init_std": 0.02,
        "attn_other_init_std": 0.03,
        "ffn_uplayer_init_std": 0.04,
        "ffn_other_init_std": 0.05,
        "out_head_init_std": 0.06,
    }
    model = tiny_model("QWEN2", init_type=distribution, use_scaled_init=scaled, hidden_size=96, vocab_size=200, **stds)
    shrink = 1 / math.sqrt(2 * model.architecture.num_layers) if scaled else 1.0
    expected = {
        "tok_embeddings.weight": 0.01,
        "layers.1.attention.wq.weight": 0.02,
        "layers.1.attention.wk.weight": 0.02,
        "layers.1.attention.wo.weight": 0.03 * shrink,
        "layers.0.feed_forward.w1.weight": 0.04,
        "layers.0.feed_forward.w3.weight": 0.04,
        "layers.0.feed_forward.w2.weight": 0.05 * shrink,
        "output.weight": 0.06,
    }
    for name, std in expected.items():
        weight = model.get_parameter(name)
        # The standard error of a standard deviation is std / sqrt(2 n): five of them.
        assert abs(weight.std().item() - std) < 5 * std / math.sqrt(2 * weight.numel())
        if distribution == "uniform":
            assert weight.abs().max() <= math.sqrt(3) * std
    assert not model.layers["0"].attention.wq.bias.any()
    assert torch.equal(model.norm.weight, torch.ones(96))
    assert not tiny_model("GEMMA").norm.weight.any()


def test_a_recipe_repeats() -> None:
    first, second = torch.empty(50), torch.empty(50)
    for tensor in (first, second):
        Uniform(0.5).fill(tensor, torch.Generator().manual_seed(3))
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="no initializer"):
        initializer_of(nn.Parameter(first))


def test_dynamic_rope_stretches_each_document_by_its_own_length() -> None:
    model = tiny_model("LLAMA2", use_dynamic_ntk_rope=True, max_position_embeddings=10)
    lengths = (8, 25)
    ids = _ids(1, 33)
    packed = model(ids, _positions(*lengths), VarlenMetadata.of(lengths))
    for document, hidden in zip(ids.split(lengths, 1), packed.split(lengths, 1), strict=True):
        torch.testing.assert_close(model(document, _positions(document.shape[1])), hidden)


def test_packed_loss_equals_padded_rows() -> None:
    """The two batch layouts of the data floor are one computation."""
    model = tiny_model("INTERNLM2", **GQA)
    lengths = (5, 12)
    ids = _ids(1, 17)
    packed = model(ids, _positions(*lengths), VarlenMetadata.of(lengths))[0].split(lengths)
    rows = torch.stack([F.pad(x, (0, 12 - x.shape[0])) for x in ids[0].split(lengths)])
    padded = model(rows, torch.arange(12).expand(2, -1))
    for hidden, row, length in zip(packed, padded, lengths, strict=True):
        torch.testing.assert_close(hidden, row[:length])
