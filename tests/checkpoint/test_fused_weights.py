"""A checkpoint with fused projections loads into a model that holds them apart, and the other way round."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import RankPool
from helpers.reads import CountReads
from helpers.resume import optimizer_of, save, tensors_of
from helpers.tiny import tiny_config
from torch import Tensor, nn

from internlm.checkpoint.boxed_tensor import BoxedTensor
from internlm.checkpoint.fused_weights import describe_regrouping, heads_of, in_stored_form, stored_names
from internlm.checkpoint.manager import CheckpointManager
from internlm.checkpoint.reading import load_tensors, saved_shapes
from internlm.checkpoint.run_state import load_weights, model_tensors, optimizer_tensors
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.shard_spec import Box, ShardSpec
from internlm.model.modules.attention import Attention
from internlm.model.registry import build_model
from internlm.model.roles import HeadShape
from internlm.utils.errors import CheckpointError
from internlm.utils.storage import storage_path
from internlm.verify.case import Case, Combination, changed
from internlm.verify.record import Array, RankRecord, Record, TensorBox, join, join_ranks
from internlm.verify.report import judge
from internlm.verify.run import CaseRun, start_case

Ranks = Callable[[int], RankPool]

HEADS = [HeadShape(4, 2, 8), HeadShape(4, 4, 2), HeadShape(6, 1, 4), HeadShape(8, 2, 2)]


def fuse(tensors: dict[str, Any], heads: HeadShape) -> dict[str, Any]:
    """Row by row, straight from the words of `Attention` and `FeedForward`; NumPy arrays by name."""
    fused: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if ".wq." in name:
            q, k, v = (
                tensors[name.replace(".wq.", f".{part}.")].reshape(-1, heads.head_dim, *tensor.shape[1:])
                for part in ("wq", "wk", "wv")
            )
            size = heads.num_heads // heads.num_kv_heads
            blocks = [
                block
                for group in range(heads.num_kv_heads)
                for block in (*q[group * size : (group + 1) * size], k[group], v[group])
            ]
            fused[name.replace(".wq.", ".wqkv.")] = np.concatenate(blocks)
        elif ".w1." in name:
            fused[name.replace(".w1.", ".w13.")] = np.concatenate([tensor, tensors[name.replace(".w1.", ".w3.")]])
        elif not any(f".{part}." in name for part in ("wk", "wv", "w3")):
            fused[name] = tensor
    return fused


# -- arithmetic --------------------------------------------------------------------------------------------------------


def separate_weights(heads: HeadShape, hidden: int = 3, ffn: int = 5) -> dict[str, Array]:
    """Both projections, weights and biases, all elements different."""
    rows = {"wq": heads.num_heads * heads.head_dim, "wk": heads.num_kv_heads * heads.head_dim}
    rows["wv"] = rows["wk"]
    shapes: dict[str, tuple[int, ...]] = {}
    for part, size in rows.items():
        shapes[f"layers.0.attention.{part}.weight"], shapes[f"layers.0.attention.{part}.bias"] = (size, hidden), (size,)
    for part in ("w1", "w3"):
        shapes[f"layers.0.feed_forward.{part}.weight"] = (ffn, hidden)
    total, tensors = 0, {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        tensors[name] = np.arange(total, total + size, dtype=np.float32).reshape(shape)
        total += size
    return tensors


def read_as(stored: dict[str, Array], wanted: dict[str, Array], heads: HeadShape, seed: int) -> int:
    """Read tensors of the shapes of `wanted` in random flat pieces, as ZeRO cuts them; returns elements read."""
    cuts = np.random.default_rng(seed)
    tensors: dict[str, BoxedTensor] = {}
    found: dict[str, Tensor] = {}
    for name, expected in wanted.items():
        found[name] = torch.full(expected.shape, -1.0)
        edges = sorted({0, expected.size, *map(int, cuts.integers(0, expected.size, 4))})
        spec = ShardSpec.whole(name, expected.shape)
        boxes = [box for a, b in pairwise(edges) for box in spec.boxes_of_flat_range(a, b)]
        tensors[name] = BoxedTensor(expected.shape, torch.float32, [(b, found[name][b.local_slices()]) for b in boxes])
    num_read = 0
    for name, boxed in in_stored_form(
        tensors, {name: array.shape for name, array in stored.items()}, {"": heads}
    ).items():
        assert tuple(boxed.size()) == stored[name].shape
        assert len({box.global_offset for box, _ in boxed.pieces}) == len(boxed.pieces), "the reader finds by offset"
        for box, piece in boxed.pieces:
            piece.copy_(torch.from_numpy(stored[name])[box.global_slices()])
            num_read += piece.numel()
    for name, expected in wanted.items():
        assert np.array_equal(found[name].numpy(), expected), name
    return num_read


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_any_box_of_one_form_is_boxes_of_the_other(heads: HeadShape, seed: int) -> None:
    separate = separate_weights(heads)
    fused = fuse(separate, heads)
    num_elements = sum(array.size for array in separate.values())
    for stored, wanted in ((separate, fused), (fused, separate), (fused, fused)):
        assert read_as(stored, wanted, heads, seed) == num_elements


def test_a_tensor_in_neither_form_stays_what_is_missing() -> None:
    stored = {"layers.0.attention.wq.weight": (4, 3), "layers.0.attention.wk.weight": (4, 3)}
    name = "layers.0.attention.wqkv.weight"
    assert stored_names(name, stored) == (name,)
    wanted = BoxedTensor((12, 3), torch.float32, [(Box((0, 0), (0, 0), (12, 3)), torch.zeros(12, 3))])
    assert in_stored_form({name: wanted}, stored, {"": HeadShape(2, 2, 2)}) == {name: wanted}


@pytest.mark.parametrize(
    ("name", "shape", "stored"),
    [
        ("attention.wqkv", (12, 3), {"wq": (4, 3), "wk": (4, 3), "wv": (4, 2)}),
        ("attention.wqkv", (12, 3), {"wq": (4, 3), "wk": (6, 3), "wv": (2, 3)}),
        ("attention.wqkv", (16, 3), {"wq": (4, 3), "wk": (4, 3), "wv": (4, 3)}),
        ("attention.wk", (4, 3), {"wqkv": (16, 3)}),
        ("feed_forward.w1", (5, 3), {"w13": (12, 3)}),
        ("feed_forward.w13", (10, 3), {"w1": (6, 3), "w3": (4, 3)}),
    ],
)
def test_other_sizes_are_refused_by_name(name: str, shape: tuple[int, int], stored: dict[str, tuple[int, int]]) -> None:
    module = name.rpartition(".")[0]
    held = {f"model/layers.1.{module}.{part}.weight": size for part, size in stored.items()}
    key = f"model/layers.1.{name}.weight"
    wanted = BoxedTensor(shape, torch.float32, [(Box((0, 0), (0, 0), shape), torch.zeros(shape))])
    with pytest.raises(CheckpointError, match=rf"'{key}' has shape \[{shape[0]}, 3\], but the checkpoint stores"):
        in_stored_form({key: wanted}, held, {"": HeadShape(2, 2, 2)})


def test_what_is_regrouped_is_named() -> None:
    separate = separate_weights(HEADS[0])
    fused = fuse(separate, HEADS[0])
    names = [f"model/{name}" for name in separate]
    assert describe_regrouping(fused, separate) == [
        "1 x attention.wqkv from wq, wk, wv",
        "1 x feed_forward.w13 from w1, w3",
    ]
    assert describe_regrouping(names, [f"model/{name}" for name in fused]) == [
        "1 x attention.wq, wk, wv from wqkv",
        "1 x feed_forward.w1, w3 from w13",
    ]
    assert describe_regrouping(names, names) == []


# -- runs --------------------------------------------------------------------------------------------------------------


def in_form(case: Case, fused: bool) -> Case:
    return replace(
        case, config=changed(case.config, {"model.enable_qkv_fusion": fused, "model.mlp_layer_fusion": fused})
    )


def start(case: Case, context: ParallelContext, path: str, content: tuple[str, ...] = ("all",)) -> CaseRun:
    """A run that goes on from a checkpoint; its own weights would be others."""
    run = CaseRun(replace(case, config=changed(case.config, {"seed": 7})), context)
    CheckpointManager(None).load(run.trainer, path, content)
    run.recorder.restart()
    return run


def alone(case: Case, folder: str) -> RankRecord:
    """Four steps in one process; the weights that it starts from are saved."""
    run = CaseRun(case, start_case(case))
    save(CheckpointManager(folder), run.trainer)
    run.train(4)
    return run.record


def two_steps(
    case: Case, path: str, folder: str, content: tuple[str, ...], until: int
) -> tuple[RankRecord, list[TensorBox], list[TensorBox]]:
    """Go on from a checkpoint and save; what was seen, and all tensors after loading and when saved."""
    context = start_case(case)
    run = start(case, context, path, content)
    loaded = tensors_of(run.trainer)
    run.train(until)
    save(CheckpointManager(folder), run.trainer)
    saved = tensors_of(run.trainer)
    context.close()
    return run.record, loaded, saved


LAYOUTS = [
    "ranks=1 model:kv_heads=2",
    "ranks=2 layout:zero=2 model:kv_heads=2,bias stepping:bucket=1000",
    "ranks=2 layout:tensor=2,mode=mtp model:kv_heads=2",
    "ranks=2 layout:tensor=2,mode=mtp model:kv_heads=1",
    "ranks=2 layout:tensor=2,mode=isp,weight=2 model:kv_heads=2",
    "ranks=2 layout:pipeline=2 model:kv_heads=2",
    "ranks=2 layout:fsdp model:kv_heads=2",
    "ranks=4 layout:tensor=2,mode=mtp,pipeline=2 model:kv_heads=2,dtype=bfloat16 stepping:moments_bf16",
]


@pytest.mark.parametrize("leaves_fused", [True, False], ids=["fused, then apart", "apart, then fused"])
@pytest.mark.parametrize("text", LAYOUTS)
def test_two_steps_in_each_form_are_four_in_one(text: str, leaves_fused: bool, ranks: Ranks, tmp_path: Path) -> None:
    """Two steps, saved, two more in the other form: one process that never changed its form. What was saved is loaded
    bit for bit: weights, masters and moments."""
    first = in_form(Combination.parse(text).case(), leaves_fused)
    second = in_form(first, not leaves_fused)
    reference = second.reference()
    expected = join_ranks(ranks(1).run(alone, reference, str(tmp_path / "alone")))
    pool = ranks(first.world_size)
    before = pool.run(two_steps, first, str(tmp_path / "alone" / "0"), str(tmp_path / "own"), ("model",), 2)
    after = pool.run(two_steps, second, str(tmp_path / "own" / "2"), str(tmp_path / "more"), ("all",), 4)

    heads = head_shape(first)
    left, taken_up = join_ranks([record for record, _, _ in before]), join_ranks([record for record, _, _ in after])
    assert_same(
        join([loaded for _, loaded, _ in after], "", {}), join([saved for _, _, saved in before], "", {}), heads
    )
    assert_same(left.initial, expected.initial, heads)
    record = Record(left.initial, [*left.steps, *taken_up.steps], {})
    verdict = judge(first, fused_record(record, heads), fused_record(expected, heads))
    assert len(record.steps) == 4
    assert verdict.is_equal, verdict.explain()


def fused_record(record: Record, heads: HeadShape) -> Record:
    """The same run with all projections fused."""
    steps = [
        replace(step, gradients=fuse(step.gradients, heads), weights=fuse(step.weights, heads)) for step in record.steps
    ]
    return Record(fuse(record.initial, heads), steps, {})


def head_shape(case: Case) -> HeadShape:
    model = case.config.model
    num_kv_heads = model.num_kv_attention_heads or model.num_attention_heads
    return HeadShape(model.num_attention_heads, num_kv_heads, model.hidden_size // model.num_attention_heads)


def assert_same(found: dict[str, Array], expected: dict[str, Array], heads: HeadShape) -> None:
    """Equal bits once both are fused."""
    found, expected = fuse(found, heads), fuse(expected, heads)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.tobytes() == expected[name].tobytes(), name


def test_optimizer_state_alone_is_regrouped_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And the log names what was."""
    fused, separate = (in_form(Combination.parse("ranks=1").case(), form) for form in (True, False))
    context = start_case(fused)
    run = CaseRun(fused, context)
    run.train(2)
    save(CheckpointManager(tmp_path), run.trainer)
    saved = join([tensors_of(run.trainer)], "", {})
    with caplog.at_level(logging.INFO):
        other = start(separate, context, str(tmp_path / "2"), ("optimizer",))
    found = join([tensors_of(other.trainer)], "", {})
    moments = {name: array for name, array in found.items() if name.startswith("exp_avg")}
    assert_same(
        moments, {name: array for name, array in saved.items() if name.startswith("exp_avg")}, head_shape(fused)
    )
    assert "2 x attention.wq, wk, wv from wqkv" in caplog.text
    assert "2 x feed_forward.w1, w3 from w13" in caplog.text


class OneSource:
    """A `WeightSource` of a dict."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.reads = tensors, list[str]()

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name]


@pytest.mark.parametrize("is_fused", [True, False])
def test_a_block_is_regrouped_by_its_own_heads(is_fused: bool) -> None:
    """The weights have the same shapes by the model's heads: only the order of the rows tells."""

    def model(fused: bool) -> nn.Module:
        config = tiny_config(enable_qkv_fusion=fused)
        with torch.device("meta"):
            model: Any = build_model("LLAMA2", config)
            wide = replace(model.architecture, num_heads=2, num_kv_heads=1, head_dim=16)
            model.layers["1"].attention = Attention(wide, 1)
        return model

    heads = heads_of([model(is_fused)])
    assert heads["layers.1.attention"] == HeadShape(2, 1, 16) and heads[""] == HeadShape(4, 2, 8)
    rng = np.random.default_rng(0)
    for block in ("layers.0.attention", "layers.1.attention"):
        q, k, v = (f"{block}.{name}.weight" for name in ("wq", "wk", "wv"))
        parts = {q: rng.random((32, 3)), k: rng.random((16, 3)), v: rng.random((16, 3))}
        own = heads[block]
        rows = [part.reshape(own.num_kv_heads, -1, 3) for part in parts.values()]
        whole = {f"{block}.wqkv.weight": np.concatenate(rows, axis=1).reshape(64, 3)}
        stored, wanted = (whole, parts) if is_fused else (parts, whole)
        found = {name: torch.zeros(array.shape, dtype=torch.float64) for name, array in wanted.items()}
        tensors = {
            name: BoxedTensor.of_parameter(tensor, ShardSpec.whole(name, tuple(tensor.shape)))
            for name, tensor in found.items()
        }
        shapes = {name: array.shape for name, array in stored.items()}
        for name, boxed in in_stored_form(tensors, shapes, heads).items():
            for box, piece in boxed.pieces:
                piece.copy_(torch.from_numpy(stored[name])[box.global_slices()])
        for name, array in wanted.items():
            assert np.array_equal(found[name].numpy(), array), name


@pytest.mark.parametrize("is_fused", [True, False])
def test_weights_of_another_source_are_regrouped(is_fused: bool) -> None:
    """Each tensor of it is read once."""
    case = in_form(Combination.parse("ranks=1 model:kv_heads=2").case(), is_fused)
    context = start_case(case)
    saved = {
        name: torch.from_numpy(a) for name, a in join([tensors_of(CaseRun(case, context).trainer)], "", {}).items()
    }
    source = OneSource({name: tensor for name, tensor in saved.items() if not name.startswith("exp_avg")})
    other = CaseRun(in_form(case, not is_fused), context)
    load_weights(other.trainer, source, "the source")
    found = join([tensors_of(other.trainer)], "", {})
    assert sorted(source.reads) == sorted(source.tensors)
    weights = {name: array for name, array in found.items() if not name.startswith("exp_avg")}
    assert_same(weights, {name: tensor.numpy() for name, tensor in source.tensors.items()}, head_shape(case))


def read_share(case: Case, path: str) -> list[tuple[str, int, int]]:
    """(key, bytes that this rank holds, bytes that it reads) of every tensor."""
    context = start_case(case)
    run = CaseRun(case, context)
    optimizer = optimizer_of(run.trainer)
    heads, saved, seen = head_shape(case), saved_shapes(storage_path(path)), []
    tensors = {**model_tensors(*optimizer.chunks), **optimizer_tensors(optimizer)}
    for key, tensor in in_stored_form(tensors, saved, {"": heads}).items():
        with CountReads() as reads:
            load_tensors(storage_path(path), {key: tensor}, no_dist=True)
        seen.append((key, sum(piece.numel() * piece.element_size() for _, piece in tensor.pieces), reads.num_bytes))
    context.close()
    return seen


def write(case: Case, folder: str) -> None:
    save(CheckpointManager(folder), CaseRun(case, start_case(case)).trainer)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("layout", ["tensor=4,mode=mtp", "mode=isp,weight=4", "zero=4"])
def test_a_rank_reads_its_own_rows_of_the_other_form(layout: str, is_fused: bool, ranks: Ranks, tmp_path: Path) -> None:
    case = Combination.parse(f"ranks=4 layout:{layout} model:layers=1").case()
    wide = changed(case.config, {"model.hidden_size": 512, "model.intermediate_size": 2048})
    case = in_form(replace(case, config=wide), is_fused)
    alone = in_form(case, not is_fused).reference()
    ranks(1).run(write, alone, str(tmp_path))
    projections = 0
    for seen in ranks(4).run(read_share, case, str(tmp_path / "0")):
        for key, held, read in seen:
            if any(f".{part}." in key for part in ("wqkv", "wq", "wk", "wv", "w13", "w1", "w3")):
                # The list of tensors, the directory of the zip, and the rest of rows that are shared.
                assert held <= read <= held + 2**16, key
                projections += 1
    assert projections
