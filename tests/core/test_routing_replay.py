"""Chosen experts in files: the same from every layout, and taken by every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.layouts import record_of
from helpers.ranks import RankFailedError
from helpers.resume import Ranks

from internlm.core.routing_files import check_layers, load_routing, path_of_routing, save_routing
from internlm.utils.errors import DataError
from internlm.verify.batches import local_batch
from internlm.verify.case import Case, Combination
from internlm.verify.compare import compare, tolerance_of
from internlm.verify.report import judge
from internlm.verify.run import CaseRun, run_case, start_case

MODEL = "model:family=QWEN2MOE,experts=8,top_k=2,layers=4,checkpoint=1.0"
STEPS = 2
LAYOUTS = (
    "ranks=2 layout:tensor=2,mode=mtp,expert=2",
    "ranks=4 layout:tensor=2,mode=msp,expert=4",
    "ranks=4 layout:pipeline=2,schedule=ZBV,expert=2",
    "ranks=2 layout:fsdp",
)
CONTEXT_LAYOUTS = (
    "ranks=4 layout:context=2,context_cut=zigzag,tensor=2,mode=msp",
    "ranks=4 layout:context=2,context_cut=document_zigzag,tensor=2,mode=mtp,expert=2",
    # 3 ranks do not divide the 32 tokens of a micro-batch, which get one of padding.
    "ranks=3 layout:context=3,context_cut=contiguous",
)


def case_of(layout: str, *, dtype: str = "float64", documents: str = "packed=false") -> Case:
    return Combination.parse(f"{layout} {MODEL},dtype={dtype} stepping:micro_batches=8 documents:{documents}").case()


def written(folder: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(folder)): np.load(path) for path in sorted(folder.rglob("*.npy"))}


def own_routing(folder: Path) -> Path:
    """Files in which tokens have experts that no router would choose."""
    random = np.random.default_rng(0)
    for step in range(1, STEPS + 1):
        for layer in range(4):
            experts = random.permuted(np.tile(np.arange(8), (16, 16, 1)), axis=-1)[..., :2]
            save_routing(path_of_routing(folder, step, layer), experts)
    return folder


@pytest.mark.parametrize("layout", (*LAYOUTS[:3], *CONTEXT_LAYOUTS))
def test_all_layouts_write_the_same_files(layout: str, ranks: Ranks, tmp_path: Path) -> None:
    case = case_of(layout)
    record_of(case.with_routing(tmp_path / "layout", write=True), ranks, STEPS)
    record_of(case.reference().with_routing(tmp_path / "one", write=True), ranks, STEPS)
    files, expected = written(tmp_path / "layout"), written(tmp_path / "one")
    assert list(files) == [f"step-{step}/layer-{n}.npy" for step in (1, 2) for n in range(4)]
    for name, experts in expected.items():
        # 8 micro-batches of 2 rows.
        assert experts.shape == (16, 16, 2)
        assert experts.dtype == np.int16
        np.testing.assert_array_equal(files[name], experts)


@pytest.mark.parametrize(
    ("layout", "documents"),
    [
        (LAYOUTS[0], "packed=false,ragged=false"),
        (LAYOUTS[1], "packed=true,ragged"),
        (LAYOUTS[2], "packed=false,ragged=false"),
        (CONTEXT_LAYOUTS[0], "packed=false,ragged=false"),
        (CONTEXT_LAYOUTS[1], "packed=true,ragged"),
        (CONTEXT_LAYOUTS[2], "packed=true,ragged"),
    ],
)
def test_all_layouts_take_the_experts_of_files(layout: str, documents: str, ranks: Ranks, tmp_path: Path) -> None:
    folder = own_routing(tmp_path)
    if "packed=true" in documents:
        for path in folder.rglob("*.npy"):
            save_routing(path, np.load(path).reshape(8, 32, 2))
    case = case_of(layout, documents=documents)
    expected = record_of(case.reference().with_routing(folder), ranks, STEPS)
    verdict = judge(case, record_of(case.with_routing(folder), ranks, STEPS), expected)
    assert verdict.is_equal, verdict.explain()
    counts = np.bincount(np.load(path_of_routing(folder, 2, 1)).flatten(), minlength=8)
    assert expected.steps[1].routing["moe/load/1"] == pytest.approx(counts.max() / counts.mean())
    # The choice is another one, and has an effect.
    own = record_of(case.reference(), ranks, STEPS)
    assert own.steps[0].routing["moe/load/1"] != expected.steps[0].routing["moe/load/1"]
    assert own.steps[0].loss != expected.steps[0].loss


def test_bf16_runs_compare_at_equal_routing(ranks: Ranks, tmp_path: Path) -> None:
    """Written in one layout, read in others; without the files, routers choose others."""
    first, *others = (case_of(layout, dtype="bfloat16") for layout in LAYOUTS[1:])
    expected = record_of(first.with_routing(tmp_path / "first", write=True), ranks, STEPS)
    for other in others:
        record = record_of(other.with_routing(tmp_path / "first"), ranks, STEPS)
        assert compare(record, expected, tolerance_of(other)) == []
    record_of(others[0].with_routing(tmp_path / "other", write=True), ranks, STEPS)
    files, other_files = written(tmp_path / "first"), written(tmp_path / "other")
    flips = sum(int((np.sort(files[name]) != np.sort(other_files[name])).any(-1).sum()) for name in files)
    assert 0 < flips < 100


def evaluated(case: Case) -> float:
    """The loss of a forward pass without gradients after a step."""
    context = start_case(case)
    run = CaseRun(case, context)
    run.train(1)
    losses = []

    class Sink:
        def update(self, token_losses, correct, labels, type_ids) -> None:  # type: ignore[no-untyped-def]
            losses.append(float(token_losses.double().sum()))

    for micro in local_batch(case, 1, 0, 1).micro_batches:
        run.trainer.engine.evaluate(micro, Sink())
    context.close()
    return sum(losses)


def test_validation_is_not_replayed(tmp_path: Path) -> None:
    case = case_of("ranks=1")
    folder = tmp_path / "own"
    free = evaluated(case.with_routing(folder, write=True))
    # One step; the second one has no files.
    assert len(list(folder.rglob("*.npy"))) == 4
    assert evaluated(case.with_routing(folder)) == free


def test_a_step_without_files_ends_the_run(ranks: Ranks, tmp_path: Path) -> None:
    case = case_of(LAYOUTS[1])
    record_of(case.with_routing(tmp_path, write=True), ranks, 1)
    with pytest.raises(RankFailedError, match=r"DataError: .*step-2/layer-0.npy does not exist: moe.replay.read needs"):
        ranks(4).run(run_case, case.with_routing(tmp_path), STEPS)


def test_files_of_another_model_are_refused(tmp_path: Path) -> None:
    case = case_of("ranks=1")
    evaluated(case.with_routing(tmp_path, write=True))
    save_routing(path_of_routing(tmp_path, 1, 4), GOOD)
    with pytest.raises(DataError, match=r"step-1/layer-4\.npy is of no layer .* whose layers are \[0, 1, 2, 3\]"):
        evaluated(case.with_routing(tmp_path))


@pytest.mark.parametrize("name", ["layer-0.npy", "layer-01.npy", "layer-3.npy"])
def test_only_files_of_layers_with_experts_belong_to_a_step(name: str, tmp_path: Path) -> None:
    save_routing(path_of_routing(tmp_path, 2, 1), GOOD)
    check_layers(tmp_path, 2, [1, 2])
    check_layers(tmp_path, 1, [1, 2])
    save_routing(tmp_path / "step-2" / name, GOOD)
    with pytest.raises(DataError, match=rf"step-2/{name} is of no layer"):
        check_layers(tmp_path, 2, [1, 2])


GOOD = np.tile(np.arange(2), (4, 6, 1))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (GOOD[:3], r"has int16 \[3, 6, 2\], and this run needs integers \[4, 6, 2\]"),
        (GOOD[..., :1], r"has int16 \[4, 6, 1\]"),
        (GOOD.astype(np.float32), r"has float32 \[4, 6, 2\]"),
        (np.where(np.arange(48).reshape(4, 6, 2) == 43, 8, GOOD), r"row 3, position 3 has an expert that is not one"),
        (np.where(np.arange(48).reshape(4, 6, 2) == 43, -1, GOOD), r"row 3, position 3 has an expert .* 0 to 7: \[0,"),
        (np.where(np.arange(48).reshape(4, 6, 2) == 40, 1, GOOD), r"row 3, position 2 has the same expert twice: \[1,"),
    ],
    ids=["rows", "experts of a token", "dtype", "too large", "negative", "twice"],
)
def test_wrong_files_are_refused_by_place(array: np.ndarray, message: str, tmp_path: Path) -> None:
    path = path_of_routing(tmp_path, 3, 0)
    if array.dtype.kind == "f":
        path.parent.mkdir()
        np.save(path, array)
    else:
        save_routing(path, array)
    with pytest.raises(DataError, match=rf"step-3/layer-0\.npy.*{message}"):
        load_routing(path, (4, 6, 2), 8, slice(2, 4), np.array([2, 3, 8, 9]))


def test_an_archive_of_arrays_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "layer-0.npy"
    with path.open("wb") as file:
        np.savez(file, GOOD)
    with pytest.raises(DataError, match=r"layer-0\.npy is an archive of arrays"):
        load_routing(path, (4, 6, 2), 8, slice(0, 4), np.arange(24))


@pytest.mark.parametrize("content", [b"", b"not an array", b"\x93NUMPY\x01\x00v\x00{'descr"], ids=str)
def test_broken_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "layer-0.npy"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"layer-0\.npy is not a (complete )?\.npy array.*; write it again"):
        load_routing(path, (4, 6, 2), 8, slice(0, 4), np.arange(24))
