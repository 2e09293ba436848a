"""Initial weights: drawn block by block, the same in every layout, and never more of them than a block at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from helpers.tiny import tiny_config
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel import materialize
from internlm.core.parallel.fsdp import apply_fsdp, local_tensor, rows_of
from internlm.core.parallel.layers import layers_of
from internlm.core.parallel.materialize import BLOCK, blocks_of, draw
from internlm.core.parallel.model_parallel import ParallelOptions
from internlm.core.parallel.parallelize import parallelize
from internlm.core.parallel.shard_spec import ShardSpec, shard_spec_of
from internlm.core.parallel.weight_splits import even_part, padded_rows, ranges_spec
from internlm.model.initialization import Initializer, Normal, Ones, Uniform, Zeros, set_initializer
from internlm.model.registry import build_model

CPU = torch.device("cpu")
MIB = 2**20
NORMAL = Normal(0.02)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix of a tiny model has several blocks."""
    monkeypatch.setattr(materialize, "BLOCK", 100)


def drawn(spec: ShardSpec, initializer: Initializer = NORMAL, dtype: torch.dtype = torch.float32) -> Tensor:
    return draw(spec, initializer, 7, dtype, CPU)


# -- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(), (1,), (250,), (7, 30), (3, 400), (2, 5, 30), (5, 3, 7), (2, 3, 4, 9), (0, 30), (100, 1)]
)
@pytest.mark.usefixtures("small_blocks")
def test_blocks_cover_a_tensor_once(shape: tuple[int, ...]) -> None:
    count = torch.zeros(shape, dtype=torch.int64)
    for offset, size in blocks_of(shape):
        count[tuple(slice(start, start + extent) for start, extent in zip(offset, size, strict=True))] += 1
        assert math.prod(size) <= max(100, shape[-1] if shape else 1)
    assert torch.equal(count, torch.ones_like(count))


@pytest.mark.usefixtures("small_blocks")
def test_no_block_reaches_into_two_experts() -> None:
    assert list(blocks_of((2, 5, 30))) == [
        ((0, 0, 0), (1, 3, 30)),
        ((0, 3, 0), (1, 2, 30)),
        ((1, 0, 0), (1, 3, 30)),
        ((1, 3, 0), (1, 2, 30)),
    ]


def test_a_tensor_of_one_block_is_drawn_at_once() -> None:
    """Weights of earlier versions: keyed by seed and name."""
    key = int.from_bytes(hashlib.sha256(b"7/layers.0.w").digest()[:8], "little") >> 1
    expected = torch.empty(2048, 2048)
    assert expected.numel() == BLOCK
    Normal(0.02).fill(expected, torch.Generator().manual_seed(key))
    assert torch.equal(drawn(ShardSpec.whole("layers.0.w", (2048, 2048))), expected)


@pytest.mark.usefixtures("small_blocks")
def test_a_block_is_keyed_by_seed_name_and_number_from_0() -> None:
    """Another key would give a run of the same seed other weights than an earlier version."""
    whole = drawn(ShardSpec.whole("layers.0.w", (10, 30)))
    for number, (offset, size) in enumerate(blocks_of((10, 30))):
        key = int.from_bytes(hashlib.sha256(f"7/layers.0.w/{number}".encode()).digest()[:8], "little") >> 1
        expected = torch.empty(size)
        NORMAL.fill(expected, torch.Generator().manual_seed(key))
        assert torch.equal(whole[offset[0] : offset[0] + size[0]], expected)
    assert number == 3


@pytest.mark.parametrize("initializer", [Normal(0.02), Uniform(0.5)])
def test_blocks_are_independent_and_of_the_recipe(initializer: Initializer) -> None:
    whole = drawn(ShardSpec.whole("w", (4096, 2048)), initializer)
    first, second = whole.chunk(2)
    std = 0.02 if isinstance(initializer, Normal) else 0.5 / math.sqrt(3)
    for block in (first, second):
        # The standard error of each is below a thousandth.
        assert abs(float(block.mean())) < 5e-3 * std
        assert abs(float(block.std()) / std - 1) < 5e-3
    assert abs(float((first * second).mean())) < 5e-3 * std**2
    assert torch.equal(drawn(ShardSpec.whole("v", (3, 5)), Ones()), torch.ones(3, 5))
    assert torch.equal(drawn(ShardSpec.whole("v", (3, 5)), Zeros()), torch.zeros(3, 5))


# -- the same in every layout ---------------------------------------------------------------------------------------

Expected = dict[str, Tensor]


def model_of(context: ParallelContext, model_type: str, changes: dict[str, Any], **options: Any) -> nn.Module:
    with torch.device("meta"):
        model = build_model(model_type, tiny_config(**changes))
    return parallelize(model, context, seed=7, options=ParallelOptions(**options))


def assert_union(
    expected: Expected, world_size: int, parts_of: Callable[[int], list[tuple[ShardSpec, Tensor]]]
) -> None:
    """All ranks together hold each element of the one process's tensors, and nothing else but zeros."""
    found = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in expected.items()}
    for rank in range(world_size):
        for spec, local in parts_of(rank):
            padding = torch.ones(local.shape, dtype=torch.bool)
            for box in spec.boxes:
                assert torch.equal(local[box.local_slices()], expected[spec.name][box.global_slices()]), spec.name
                found[spec.name][box.global_slices()] = True
                padding[box.local_slices()] = False
            assert not local[padding].any()
    assert all(bool(elements.all()) for elements in found.values())


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
@pytest.mark.parametrize(
    ("layout", "model_type", "changes"),
    [
        # 61 tokens: the vocabulary is padded.
        ({"tensor": 2, "mode": "mtp"}, "INTERNLM2", {}),
        # Four ranks share two key-value heads.
        ({"tensor": 4, "mode": "msp", "kv_replicas": 2}, "INTERNLM2", {}),
        ({"tensor": 4, "mode": "fsp", "kv_replicas": 2}, "LLAMA2", {}),
        ({"tensor": 2, "mode": "mtp"}, "INTERNLM2", {"mlp_layer_fusion": True}),
        ({"tensor": 2, "weight": 4, "mode": "isp"}, "INTERNLM2", {"mlp_layer_fusion": True}),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_all_ranks_hold_the_weights_of_one_process(
    layout: dict[str, Any], model_type: str, changes: dict[str, Any], dtype: str
) -> None:
    changes = {**changes, "dtype": dtype}
    plain = model_of(ParallelContext.create(), model_type, changes)
    expected = {name: parameter.detach() for name, parameter in plain.named_parameters()}
    several = [name for name, tensor in expected.items() if len(list(blocks_of(tuple(tensor.shape)))) > 1]
    assert len(several) > len(expected) // 2

    def parts_of(rank: int) -> list[tuple[ShardSpec, Tensor]]:
        context = ParallelContext(ParallelLayout(world_size=4, **layout), rank, CPU)
        model = model_of(context, model_type, changes, split_embedding_hidden=False)
        return [(shard_spec_of(parameter), parameter.detach()) for parameter in model.parameters()]

    assert_union(expected, 4, parts_of)


@pytest.mark.parametrize("shape", [(61, 32), (3, 56), (6, 20, 7)])
@pytest.mark.usefixtures("small_blocks")
def test_rows_of_fsdp_and_experts(shape: tuple[int, ...]) -> None:
    """More ranks than rows, too: some hold nothing."""
    spec = ShardSpec.whole("w", shape)

    def parts_of(rank: int) -> list[tuple[ShardSpec, Tensor]]:
        rows = rows_of(spec, 4, rank)
        return [(rows, drawn(rows))]

    assert_union({"w": drawn(spec)}, 4, parts_of)


# -- memory ---------------------------------------------------------------------------------------------------------


class CountBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside that are still alive.

    Attributes:
        peak: most of them at any time.
        largest: those of the largest tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            # The storage of a DTensor is a name for that of its local tensor.
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor) and not tensor.is_meta:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        reference = StorageWeakRef(storage)
        self._alive[reference.cdata] = reference, storage.nbytes()
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        self.largest = max(self.largest, storage.nbytes())


def test_a_rank_of_a_large_layout_draws_a_block_at_a_time() -> None:
    """The embedding, and a column and a row layer, of a 70B model on one of 8 tensor ranks."""
    vocabulary, hidden, width = 128256, 8192, 28672
    own, rows = padded_rows(vocabulary, 8, 3)
    specs = [
        ranges_spec(ShardSpec.whole("embedding", (vocabulary, hidden)), 0, [own], rows),
        ranges_spec(ShardSpec.whole("w1", (width, hidden)), 0, [even_part(width, 8, 3, "")]),
        ranges_spec(ShardSpec.whole("w2", (hidden, width)), 1, [even_part(width, 8, 3, "")]),
    ]
    for spec in specs:
        with CountBytes() as count:
            local = drawn(spec, dtype=torch.bfloat16)
        assert local.nbytes < count.peak <= local.nbytes + 16 * MIB, spec.name
        assert 0.019 < float(local[::16].float().std()) < 0.021


def test_a_parallel_model_makes_no_tensor_larger_than_those_that_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `parallelize`, with small blocks in place of large weights."""
    monkeypatch.setattr(materialize, "BLOCK", 512)
    changes = {"vocab_size": 4000, "hidden_size": 64, "intermediate_size": 256, "dtype": "torch.bfloat16"}
    context = ParallelContext(ParallelLayout(world_size=4, tensor=4), 0, CPU)
    with CountBytes() as count:
        model = model_of(context, "INTERNLM2", changes)
    assert count.largest == max(parameter.nbytes for parameter in model.parameters()) == 1000 * 64 * 2


def bytes_of_fsdp(defer: bool) -> tuple[int, int, int]:
    """Peak of a run's start, bytes that the rank holds, and bytes of the largest layer."""
    context = ParallelContext.create()
    changes = {"num_layers": 12, "vocab_size": 40}
    with CountBytes() as count:
        model = apply_fsdp(model_of(context, "INTERNLM2", changes, defer_weights=defer), context)
    held = sum(local_tensor(parameter).nbytes for parameter in model.parameters())
    layer = sum(math.prod(shard_spec_of(p).global_shape) * 4 for p in layers_of(model)[0].parameters())
    return count.peak, held, layer


def test_fsdp_splits_a_layer_before_the_next_one_is_materialized(ranks: Callable[[int], RankPool]) -> None:
    for peak, held, layer in ranks(4).run(bytes_of_fsdp, True):
        assert peak < held + 3 * layer
    for peak, held, layer in ranks(4).run(bytes_of_fsdp, False):
        assert peak > held + 8 * layer


def weights_of_fsdp(defer: bool, model_type: str, changes: dict[str, Any]) -> list[tuple[str, Tensor]]:
    context = ParallelContext.create()
    model = apply_fsdp(model_of(context, model_type, changes, defer_weights=defer), context)
    assert all(
        shard_spec_of(parameter).local_shape == local_tensor(parameter).shape for parameter in model.parameters()
    )
    return [(name, local_tensor(parameter).clone()) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("INTERNLM2", {}),
        ("LLAMA2", {"dtype": "torch.bfloat16"}),
        # Its embedding is its head.
        ("GEMMA", {"dtype": "torch.bfloat16"}),
    ],
)
@pytest.mark.parametrize("world", [1, 2])
def test_deferred_weights_are_the_same(
    ranks: Callable[[int], RankPool], world: int, model_type: str, changes: dict[str, Any]
) -> None:
    run = ranks(world).run if world > 1 else lambda function, *args: [function(*args)]
    for found, expected in zip(
        run(weights_of_fsdp, True, model_type, changes), run(weights_of_fsdp, False, model_type, changes), strict=True
    ):
        assert [name for name, _ in found] == [name for name, _ in expected]
        assert all(torch.equal(one, other) for (_, one), (_, other) in zip(found, expected, strict=True))


def test_a_parameter_in_two_places_stays_one() -> None:
    shared = nn.Parameter(torch.empty(3, 5, device="meta"))
    set_initializer(shared, Normal(0.02))
    local = materialize.local_parameter(shared, ShardSpec.whole("w", (3, 5)), 7, CPU)
    first, second = nn.Module(), nn.Module()
    first.weight = second.weight = local
    materialize.materialize(nn.ModuleList([first, second]))
    assert first.weight is second.weight and not first.weight.is_meta
