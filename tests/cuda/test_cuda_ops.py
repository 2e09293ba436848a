"""Every op and every backend of attention on a GPU against its formula: forward and backward, 16 bits and 32.

Bounds are those of the self-test (`internlm/model/ops/self_test.py`): what the plain formula in the same type is off by
from float64. `attention_cases` gives those backends alone that this machine has, and every one of these.
"""

from __future__ import annotations

import random

import pytest
import torch

from internlm.model.ops import liger_kernels as liger
from internlm.model.ops.attention.causal_attention import VarlenMetadata, attention
from internlm.model.ops.attention.cuda_backends import BACKENDS, AttentionNeeds, capability_of, why_not
from internlm.model.ops.implementations import OpSettings, describe
from internlm.model.ops.self_test import attention_cases, judge, other_cases, self_tests

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of fp32 are not to be rounded to TF32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_doctor_runs(head_dim: int, dtype: torch.dtype) -> None:
    outcomes = list(self_tests(CUDA, OpSettings(dtype, head_dim)))
    assert {outcome.op for outcome in outcomes} == set(describe(CUDA))
    assert [outcome for outcome in outcomes if outcome.problem is not None] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(8, 8), (32, 8), (4, 1)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_attention_on_random_documents(seed: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Odd lengths around the sizes of a kernel's tiles, empty documents among them, and windows of all sizes.

    Flex attention, which is compiled for every window, is in one of nine.
    """
    draw = random.Random(seed)
    lengths = [draw.choice((0, 1, draw.randint(2, 40), 63, 64, 65, draw.randint(100, 300))) for _ in range(8)] + [129]
    windows = (None, 1, draw.randint(2, 63), 64, draw.randint(65, 200), 1000)
    settings = OpSettings(dtype, head_dim=64)
    wrong = [
        (case.name, problem)
        for case in attention_cases(
            CUDA, settings, dtype, lengths, heads, windows, () if (seed, heads) == (0, (32, 8)) else ("flex",)
        )
        if (problem := judge(case, CUDA, dtype, seed)) is not None
    ]
    assert wrong == [], (lengths, wrong)


@pytest.mark.parametrize("head_dim", [8, 40, 100, 256])
def test_unusual_head_sizes(head_dim: int) -> None:
    """Whatever is chosen for them is right."""
    settings = OpSettings(torch.bfloat16, head_dim)
    for case in attention_cases(CUDA, settings, torch.bfloat16):
        assert judge(case, CUDA, torch.bfloat16) is None, case.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", ["none", "auto"])
@pytest.mark.parametrize(("tokens", "width"), [((1, 1), 2), ((3, 17), 50), ((2, 257), 1536), ((1, 4), 8192)], ids=str)
def test_other_ops(tokens: tuple[int, int], width: int, kernels: str, dtype: torch.dtype) -> None:
    settings = OpSettings(dtype, head_dim=64, fused_kernels=kernels)
    wrong = [
        (case.op, case.name, problem)
        for case in other_cases(CUDA, settings, tokens, width)
        if (problem := judge(case, CUDA, dtype)) is not None
    ]
    assert wrong == [], wrong


def test_no_tokens() -> None:
    """A micro-batch without a token: no kernel is launched on nothing."""
    for kernels in ("none", "auto"):
        settings = OpSettings(torch.bfloat16, head_dim=64, fused_kernels=kernels)
        for case in other_cases(CUDA, settings, (1, 0)):
            if case.op != "linear_cross_entropy":
                assert judge(case, CUDA, torch.bfloat16) is None, case.name


def test_liger_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel")
    calls = []
    right = liger.rms_norm
    monkeypatch.setattr(liger, "rms_norm", lambda *a, **k: calls.append(1) or right(*a, **k))
    case = next(case for case in other_cases(CUDA, OpSettings()) if case.op == "rms_norm")
    assert judge(case, CUDA, torch.bfloat16) is None and calls
    assert "liger" in describe(CUDA)["rms_norm"].implementation


@pytest.mark.parametrize("name", [backend.name for backend in BACKENDS if backend.name != "sdpa"])
def test_a_compiled_block_serves_other_documents_without_compiling_again(name: str) -> None:
    """The whole of attention is one graph, and equals what runs without compilation."""
    from torch._dynamo.testing import CompileCounterWithBackend

    needs = AttentionNeeds(capability_of(CUDA), torch.bfloat16, 64, compiled=True)
    backend = next(backend for backend in BACKENDS if backend.name == name)
    if (reason := why_not(backend, needs)) is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(attention, backend=counter, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 512, heads, 64, generator=generator).to(CUDA, torch.bfloat16).requires_grad_()
        for heads in (8, 2, 2)
    )
    for lengths in ((512,), (100, 0, 412), (1, 200, 311), (128, 128, 128, 128), (511, 1), (5, 7, 500)):
        varlen = VarlenMetadata.of(lengths)
        varlen = VarlenMetadata(varlen.cu_seqlens.to(CUDA), varlen.lengths, varlen.max_seqlen)
        ours, theirs = (function(q, k, v, varlen, attention_backend=name) for function in (compiled, attention))
        grad = torch.randn_like(theirs)
        # The same kernel with the same tiles; sums over tiles may come in another order in the backward pass.
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(theirs, (q, k, v), grad)
        )
    assert counter.frame_count <= 3


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
def test_packed_documents_of_one_length_are_rows(heads: tuple[int, int], is_compiled: bool) -> None:
    """On Hopper and later, cuDNN's kernel takes them in training; others and shorter ones stay packed."""
    if capability_of(CUDA) < (9, 0):
        pytest.skip("needs compute capability 9.0")
    torch._dynamo.reset()
    run = torch.compile(attention, fullgraph=True) if is_compiled else attention
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 2048, count, 64, generator=generator).to(CUDA, torch.bfloat16).requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    )
    for lengths, is_row in (((1024, 1024), True), ((1000, 1048), False), ((2048,), True), ((512,) * 4, False)):
        varlen = VarlenMetadata.of(lengths)
        varlen = VarlenMetadata(varlen.cu_seqlens.to(CUDA), varlen.lengths, varlen.max_seqlen)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            out = run(q, k, v, varlen, use_flash_attn=False)
            grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            torch.cuda.synchronize()
        assert any("cudnn" in event.name for event in profile.events()) == is_row, lengths
        packed = attention(q, k, v, varlen, attention_backend="torch-varlen")
        expected = torch.autograd.grad(packed, (q, k, v), torch.ones_like(packed))
        torch.testing.assert_close(out, packed, rtol=2**-7, atol=2**-7)
        torch.testing.assert_close(grads, expected, rtol=2**-6, atol=2**-5)


def test_documents_do_not_leak() -> None:
    """Changing one document leaves the others bit-equal, in every backend."""
    lengths = (65, 0, 40, 151)
    varlen = VarlenMetadata.of(lengths)
    varlen = VarlenMetadata(varlen.cu_seqlens.to(CUDA), varlen.lengths, varlen.max_seqlen)
    needs = AttentionNeeds(capability_of(CUDA), torch.bfloat16, 64)
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(1, 256, heads, 64, generator=generator).to(CUDA, torch.bfloat16) for heads in (8, 2, 2)]
    second = [torch.cat((torch.randn_like(x[:, :65]), x[:, 65:]), 1) for x in first]
    for backend in BACKENDS:
        if why_not(backend, needs) is None:
            outs = [attention(*inputs, varlen, attention_backend=backend.name) for inputs in (first, second)]
            assert torch.equal(outs[0][:, 65:], outs[1][:, 65:]), backend.name
            assert not torch.equal(outs[0][:, :65], outs[1][:, :65]), backend.name
