"""The choice of attention's kernels, and what each is called with. Kernels are stand-ins of the documented meaning; the
kernels themselves are compared in tests/cuda/test_cuda_ops.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from internlm.config.schema import ModelConfig
from internlm.model.ops import reference
from internlm.model.ops.attention import causal_attention as attention_module
from internlm.model.ops.attention import cuda_backends as attention_backends
from internlm.model.ops.attention import flex_attention as flex
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.attention.cuda_backends import (
    BACKENDS,
    AttentionNeeds,
    choose_attention,
    packed_attention,
    reason_of,
    why_not,
)
from internlm.model.ops.compiling import constant_when_compiled
from internlm.utils.errors import ConfigError

AMPERE, HOPPER, BLACKWELL, TURING = (8, 0), (9, 0), (10, 0), (7, 5)
LENGTHS = (12, 0, 1, 30)
TOTAL = sum(LENGTHS)


def _needs(
    capability: tuple[int, int] | None = HOPPER,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    packed: bool = True,
    compiled: bool = False,
) -> AttentionNeeds:
    return AttentionNeeds(capability, dtype, head_dim, packed, compiled)


@pytest.fixture(autouse=True)
def _forget_choices() -> Iterator[None]:
    choose_attention.cache_clear()
    yield
    choose_attention.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make these packages importable, and no other."""

    def install(*modules: str) -> None:
        modules = (*modules, "torch.nn.attention.varlen", "triton")
        monkeypatch.setattr(
            attention_backends, "why_unusable", lambda name, *_: None if name in modules else f"{name} is not installed"
        )

    return install


FLASH_2, FLASH_3, FLASH_4 = "flash_attn", "flash_attn_interface", "flash_attn.cute.interface"


@pytest.mark.parametrize(
    ("modules", "needs", "chosen"),
    [
        ((), _needs(), "torch-varlen"),
        ((FLASH_2, FLASH_3, FLASH_4), _needs(HOPPER), "flash-attn-3"),
        ((FLASH_2, FLASH_3, FLASH_4), _needs(BLACKWELL), "flash-attn-4"),
        ((FLASH_2, FLASH_3, FLASH_4), _needs(AMPERE), "flash-attn-2"),
        ((FLASH_4,), _needs(HOPPER), "flash-attn-4"),
        ((FLASH_4,), _needs(HOPPER, head_dim=192), "torch-varlen"),
        ((FLASH_2,), _needs(AMPERE, head_dim=100), "flash-attn-2"),
        ((), _needs(AMPERE, head_dim=100), "sdpa"),
        ((), _needs(AMPERE, head_dim=100, compiled=True), "flex"),
        ((FLASH_2, FLASH_3), _needs(dtype=torch.float32), "sdpa"),
        ((FLASH_2, FLASH_3), _needs(dtype=torch.float32, compiled=True), "flex"),
        ((FLASH_2, FLASH_3), _needs(TURING), "sdpa"),
        ((), _needs(TURING, compiled=True), "reference"),
        ((), _needs(dtype=torch.float32, head_dim=8, compiled=True), "reference"),
        ((FLASH_2, FLASH_3), _needs(packed=False), "sdpa"),
        ((), _needs(None), "torch-varlen"),
    ],
)
def test_choice(installed: Any, modules: tuple[str, ...], needs: AttentionNeeds, chosen: str) -> None:
    installed(*modules)
    assert choose_attention(needs) == chosen


def test_flash_attn_can_be_switched_off(installed: Any) -> None:
    installed(FLASH_2, FLASH_3, FLASH_4)
    for capability in (AMPERE, HOPPER, BLACKWELL):
        assert choose_attention(_needs(capability), use_flash_attn=False) == "torch-varlen"


@pytest.mark.parametrize(
    ("wanted", "needs", "message"),
    [
        ("flash-attn-2", _needs(AMPERE), "'flash-attn-2' cannot be used: flash_attn is not installed .pip install"),
        (
            "flash-attn-3",
            _needs(AMPERE),
            r"compute capability 9\.x, this GPU has 8\.0; use one of .*torch-varlen, sdpa",
        ),
        ("torch-varlen", _needs(TURING), r"8\.0 or later, this GPU has 7\.5"),
        ("torch-varlen", _needs(dtype=torch.float32), r"does not support float32 \(only float16, bfloat16\)"),
        ("torch-varlen", _needs(head_dim=100), "head dimensions 8 to 256, multiples of 8, the model has 100"),
        ("flex", _needs(head_dim=8), "head dimensions 16 to 256, the model has 8"),
        ("flash", _needs(), "'flash' is unknown; use auto, flash-attn-3"),
    ],
)
def test_a_wanted_backend_that_cannot_serve(installed: Any, wanted: str, needs: AttentionNeeds, message: str) -> None:
    installed()
    with pytest.raises(ConfigError, match=message):
        choose_attention(needs, wanted)


def test_a_wanted_backend_serves_whatever_auto_takes(installed: Any) -> None:
    installed(FLASH_2)
    for name in ("flash-attn-2", "torch-varlen", "sdpa", "flex", "reference"):
        for packed in (False, True):
            assert choose_attention(_needs(AMPERE, packed=packed), name) == name


def test_the_reason_names_what_keeps_the_preferred_ones_out(installed: Any) -> None:
    installed()
    chosen = attention_backends.BACKEND_BY_NAME[choose_attention(_needs(AMPERE))]
    reason = reason_of(chosen, _needs(AMPERE), wanted="auto", use_flash_attn=True)
    assert "flash-attn-3: needs compute capability 9.x" in reason and "flash_attn is not installed" in reason
    installed(FLASH_3)
    first = attention_backends.BACKEND_BY_NAME["flash-attn-3"]
    assert reason_of(first, _needs(), wanted="auto", use_flash_attn=True) == "the first choice"


def test_every_backend_can_be_named_in_the_config() -> None:
    from typing import get_args

    names = get_args(ModelConfig.model_fields["attention_backend"].annotation)
    assert set(names) == {"auto", *(backend.name for backend in BACKENDS)}


def _inputs(kv_heads: int = 2, head_dim: int = 10, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        return torch.randn(TOTAL, heads, head_dim, generator=generator, dtype=torch.float64)

    return draw(6), draw(kv_heads), draw(kv_heads)


def _run(name: str, inputs: tuple[Tensor, ...], window: int | None, scale: float | None = None) -> Tensor:
    varlen = VarlenMetadata.of(LENGTHS)
    q, k, v = inputs
    return packed_attention(name, q, k, v, varlen.cu_seqlens, varlen.max_seqlen, window, scale)


def _expected(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None = None) -> Tensor:
    """Document by document, so that the reference's own mask of documents is compared too."""
    pieces = zip(*(x[None].split(LENGTHS, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([reference.attention(*piece, window=window, scale=scale) for piece in pieces], 1)[0]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_the_reference_keeps_documents_apart(window: int | None, scale: float | None) -> None:
    inputs = _inputs()
    torch.testing.assert_close(_run("reference", inputs, window, scale), _expected(*inputs, window, scale))


def _standard_kernel(q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Any, ...], scale: Any, window_size: Any) -> Tensor:
    """What all variable-length kernels mean by these arguments."""
    cu_q, cu_k, max_q, max_k = bounds
    assert max_q == max_k == 30 and cu_q is cu_k
    assert cu_q.tolist() == [0, 12, 12, 13, 43] and cu_q.dtype == torch.int32
    left, right = window_size
    assert right == 0
    return _expected(q, k, v, None if left == -1 else left + 1, scale)


@pytest.mark.parametrize("window", [None, 1, 5])
def test_flash_attn_2(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    def kernel(
        q: Tensor, k: Tensor, v: Tensor, *bounds: Any, softmax_scale: Any, causal: bool, window_size: Any
    ) -> Tensor:
        assert causal
        return _standard_kernel(q, k, v, bounds, softmax_scale, window_size)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    inputs = _inputs()
    torch.testing.assert_close(_run("flash-attn-2", inputs, window, 0.3), _expected(*inputs, window, 0.3))


@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("has_gqa_flag", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_varlen_in_both_its_signatures(
    monkeypatch: pytest.MonkeyPatch, has_gqa_flag: bool, window: int | None, kv_heads: int
) -> None:
    def older(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, scale: Any = None, window_size: Any = (-1, -1)) -> Tensor:
        return _standard_kernel(q, k, v, bounds, scale, window_size)

    def newer(*arguments: Any, enable_gqa: bool = False, **options: Any) -> Tensor:
        assert enable_gqa == (kv_heads == 2)
        return older(*arguments, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", newer if has_gqa_flag else older)
    inputs = _inputs(kv_heads)
    torch.testing.assert_close(_run("torch-varlen", inputs, window), _expected(*inputs, window))


def test_flash_attn_3_and_4_take_the_place_of_pytorchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str | None] = []
    active: list[str | None] = [None]

    def put(name: str | None) -> None:
        active[0] = name
        log.append(name)

    monkeypatch.setattr(torch_attention, "current_flash_attention_impl", lambda: active[0])
    monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", put)
    monkeypatch.setattr(torch_attention, "restore_flash_attention_impl", lambda: put(None))
    seen = []

    def kernel(q: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(active[0])
        return q

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    for name in ("flash-attn-3", "flash-attn-3", "flash-attn-4", "torch-varlen", "torch-varlen"):
        _run(name, _inputs(), None)
    assert seen == ["FA3", "FA3", "FA4", None, None]
    assert log == ["FA3", "FA4", None]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda lengths: sum(lengths) > 0),
    window=st.none() | st.integers(1, 12),
    block=st.sampled_from([1, 3, 4]),
)
def test_blocks_of_flex_attention(lengths: list[int], window: int | None, block: int) -> None:
    """A block is visited when it has a visible pair, and without a mask when all its pairs are visible: neither more
    work than needed nor a pair too few."""
    total = sum(lengths)
    varlen = VarlenMetadata.of(tuple(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "_BLOCK", block)
        mask = flex.document_mask(varlen.cu_seqlens, total, window)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    place = torch.arange(total)
    distance = place[:, None] - place
    visible = (distance >= 0) & (document[:, None] == document)
    if window is not None:
        visible &= distance < window
    assert torch.equal(mask.mask_mod(0, 0, place[:, None], place), visible)  # type: ignore[arg-type]

    size = -(-total // block)
    partly, whole = (torch.zeros(size, size, dtype=torch.bool) for _ in range(2))
    for blocks, counts, columns in (
        (partly, mask.kv_num_blocks, mask.kv_indices),
        (whole, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        assert counts is not None and columns is not None
        for row in range(size):
            blocks[row, columns[0, 0, row, : counts[0, 0, row]].long()] = True
    for row in range(size):
        for column in range(size):
            tile = visible[row * block : (row + 1) * block, column * block : (column + 1) * block]
            assert bool(partly[row, column] | whole[row, column]) == bool(tile.any())
            assert not whole[row, column] or bool(tile.all())
            assert not (partly[row, column] and whole[row, column])
            # Blocks on the diagonal have pairs that are not causal, but for blocks of one token.
            assert bool(whole[row, column]) == bool(tile.all()) or row == column


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention(monkeypatch: pytest.MonkeyPatch, window: int | None, kv_heads: int) -> None:
    """On CPU it has the forward pass alone, here not compiled."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    inputs = _inputs(kv_heads, head_dim=16)
    torch.testing.assert_close(_run("flex", inputs, window, 0.3), _expected(*inputs, window, 0.3))


def _on_cuda(
    inputs: tuple[Tensor, ...], varlen: VarlenMetadata | None, window: int | None, backend: str = "auto"
) -> Tensor:
    q, k, v = inputs
    return attention_module._on_cuda(q, k, v, varlen, window, None, backend, True)


def _rows(batch: int = 2, length: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(batch, length, heads, 16, generator=generator, dtype=torch.float64) for heads in (6, 2, 2))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_rows_of_equal_length(backend: str, window: int | None) -> None:
    """A backend that is named takes them as documents of equal length."""
    inputs = _rows()
    torch.testing.assert_close(_on_cuda(inputs, None, window, backend), reference.attention(*inputs, window=window))


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_packed_rows(backend: str) -> None:
    inputs = tuple(x[None] for x in _inputs())
    q, k, v = inputs
    varlen = VarlenMetadata.of(LENGTHS)
    expected = reference.attention(q, k, v, varlen.cu_seqlens, window=5)
    torch.testing.assert_close(_on_cuda(inputs, varlen, 5, backend), expected)


@pytest.mark.parametrize(
    ("capability", "training", "first"),
    [(HOPPER, True, "cudnn"), (BLACKWELL, True, "cudnn"), (HOPPER, False, "flash"), (AMPERE, True, "flash")],
)
def test_cudnn_comes_first_for_rows_on_hopper_and_later(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], training: bool, first: str
) -> None:
    monkeypatch.setattr(attention_module, "capability_of", lambda device: capability)
    before = torch._C._get_sdp_priority_order()
    orders = []

    def sdpa(q: Tensor, *_: Any, **__: Any) -> Tensor:
        orders.append(torch._C._get_sdp_priority_order())
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    with torch.set_grad_enabled(training):
        _on_cuda(_rows(), None, None)
    backend = torch_attention.SDPBackend
    ranks = {name: orders[0].index(int(getattr(backend, f"{name.upper()}_ATTENTION"))) for name in ("cudnn", "flash")}
    assert min(ranks, key=lambda name: ranks[name]) == first
    assert torch._C._get_sdp_priority_order() == before


def test_other_documents_do_not_compile_a_block_again() -> None:
    """The host's lengths are not looked at; the longest document and their number are no constants."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def block(q: Tensor, k: Tensor, v: Tensor, varlen: VarlenMetadata) -> Tensor:
        # Float64 with heads of 10: nothing but the reference serves.
        return _on_cuda((q, k, v), varlen, 5) * 2

    inputs = tuple(x[None].requires_grad_() for x in _inputs())
    for lengths in (LENGTHS, (3, 40), (20, 20, 3), (1,) * TOTAL, (7, 7, 7, 22), (43,), (2, 41), (1, 1, 41)):
        varlen = VarlenMetadata.of(lengths)
        q, k, v = inputs
        ours = block(q, k, v, varlen)
        theirs = 2 * reference.attention(q, k, v, varlen.cu_seqlens, window=5)
        torch.testing.assert_close(ours, theirs)
        grad = torch.randn_like(ours)
        torch.testing.assert_close(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad))
    # One with the first number of documents as a constant, one for any number, one where it is 1.
    assert counter.frame_count <= 3


@torch.library.custom_op("internlm_tests::varlen", mutates_args=())
def _varlen_operator(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    assert max_seqlen == int(cu_seqlens.diff().max())
    return reference.attention(q[None], k[None], v[None], cu_seqlens)[0]


@_varlen_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    return torch.empty_like(q)


def test_a_kernel_in_a_compiled_block_gets_the_longest_document_of_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **_: Any) -> Tensor:
        return _varlen_operator(q, k, v, cu_q, max_q)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)

    @torch.compile(backend=counter, fullgraph=True)
    def block(q: Tensor, k: Tensor, v: Tensor, varlen: VarlenMetadata) -> Tensor:
        return _on_cuda((q, k, v), varlen, None, "torch-varlen")

    q, k, v = (x.bfloat16()[None] for x in _inputs(head_dim=16))
    for lengths in (LENGTHS, (3, 40), (20, 20, 3), (7, 7, 7, 22), (2, 41), (1, 1, 41)):
        varlen = VarlenMetadata.of(lengths)
        torch.testing.assert_close(block(q, k, v, varlen), reference.attention(q, k, v, varlen.cu_seqlens))
    assert counter.frame_count <= 2


def test_rows_in_a_compiled_block_keep_the_order_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is set inside the graph's making, and nothing of it is left behind."""
    monkeypatch.setattr(attention_module, "capability_of", lambda device: HOPPER)
    torch._dynamo.reset()
    before = torch._C._get_sdp_priority_order()
    inputs = _rows()
    block = torch.compile(lambda *x: _on_cuda(x, None, None), backend="aot_eager", fullgraph=True)
    ours, theirs = block(*inputs), reference.attention(*inputs)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad))
    assert torch._C._get_sdp_priority_order() == before


def test_flex_attention_in_a_compiled_block() -> None:
    """Its mask is part of the graph: other documents do not compile it again. Without gradients, as there are none on a
    CPU."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def block(q: Tensor, k: Tensor, v: Tensor, varlen: VarlenMetadata) -> Tensor:
        return _on_cuda((q, k, v), varlen, 5, "flex")

    q, k, v = (x.float()[None] for x in _inputs(head_dim=16))
    with torch.no_grad():
        for lengths in (LENGTHS, (3, 40), (20, 20, 3), (7, 7, 7, 22), (2, 41), (1, 1, 41)):
            varlen = VarlenMetadata.of(lengths)
            expected = reference.attention(q, k, v, varlen.cu_seqlens, window=5)
            torch.testing.assert_close(block(q, k, v, varlen), expected)
    assert counter.frame_count <= 2


def test_every_refusal_of_another_name(installed: Any) -> None:
    installed()
    assert why_not(BACKENDS[0], _needs(), wanted="flex") == "model.attention_backend is 'flex'"


@pytest.mark.parametrize("is_compiled", [False, True])
def test_packed_documents_of_one_length_are_rows(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As chosen on Hopper, here with the kernels of a CPU; a compiled block serves both kinds in few graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.setattr(attention_module, "backend_for", constant_when_compiled(lambda *_, **__: "torch-varlen"))
    monkeypatch.setattr(attention_module, "_cudnn_first", constant_when_compiled(lambda device: True))
    monkeypatch.setattr(attention_module, "_MIN_ROW", 16)

    def packed(name: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *_: object) -> Tensor:
        return q * 0

    monkeypatch.setattr(attention_module, "packed_attention", packed)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = eager = attention_module._on_cuda
    if is_compiled:
        run = torch.compile(eager, backend=counter, fullgraph=True)
    q, k, v = (torch.randn(1, 64, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    kinds = ((32, 32), (30, 34), (64,), (16,) * 4, (8,) * 8, (16,) * 3 + (15, 1))
    for lengths in (*kinds, (32, 32), (3, 61), (1, 40, 23), (8,) * 8):
        varlen = VarlenMetadata.of(lengths)
        out = run(q, k, v, varlen, None, None, "auto", True)
        is_row = len(set(lengths)) == 1 and lengths[0] >= 16
        assert bool(out.any()) == is_row, lengths
        if is_row:
            expected = reference.attention(q, k, v, varlen.cu_seqlens)
            torch.testing.assert_close(out, expected)
            grad = torch.randn_like(out)
            torch.testing.assert_close(
                torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad)
            )
        with torch.no_grad():
            assert is_compiled or not eager(q, k, v, varlen, None, None, "auto", True).any()
    # One for each length of rows, and for packed documents while their number and longest are found to vary.
    assert counter.frame_count <= len(kinds)
    torch._dynamo.reset()
