"""A checkpoint is global tensors: the same layout goes on bit for bit, any other to the tolerance of its sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.pipelines import Run, batch_of, build_engine
from helpers.ranks import RankPool
from helpers.runs import assert_same_bits, train
from helpers.sharded import (
    GLOBAL_SHAPES,
    LAYOUTS,
    LR,
    STEPS,
    WEIGHT_TOLERANCE,
    ShardedModel,
    assemble,
    model_pieces,
    new_optimizer,
    padding_of,
    state_pieces,
    take_step,
    train_whole,
)

from internlm.checkpoint.manager import CheckpointManager
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.hooks import TrainState


def trainer_of(engine: Any, context: ParallelContext) -> Any:
    """What a checkpoint needs of a trainer."""
    return SimpleNamespace(
        engine=engine,
        state=TrainState(),
        context=context,
        train_loader=None,
        hooks=[],
        hook_states=dict,
        notify_checkpoint_loaded=lambda path: None,
        num_skipped_updates=torch.zeros(()),
        num_bad_documents=torch.zeros(()),
    )


def part_of_run(
    name: str, folder: str, start: int, stop: int, save: bool, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Steps `start` to `stop` of hand-made shards, from the checkpoint of step `start` unless that is 0."""
    context = ParallelContext.create(LAYOUTS[name])
    model = ShardedModel(context, dtype)
    optimizer = new_optimizer(model)
    trainer = trainer_of(SimpleNamespace(optimizer=optimizer), context)
    manager = CheckpointManager(folder)
    if start:
        # Other weights and moments than those saved.
        optimizer.begin_step(1)
        model.deliver(99)
        optimizer.step(LR)
        manager.load(trainer, Path(folder) / str(start))
        assert trainer.state.step == start
    for step in range(start, stop):
        take_step(model, optimizer, step)
    trainer.state.step = stop
    if save:
        manager.save(trainer)
    context.close()
    return {"weights": model_pieces(model), "state": state_pieces(optimizer), "padding": padding_of(model)}


PAIRS = [
    ("tensor", "pipeline x tensor"),
    ("pipeline x data", "isp"),
    ("isp x pipeline", "zero x replicas"),
    ("tensor x data", "kv copies"),
    ("kv copies", "isp x replicas"),
]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_any_layout_loads_what_any_other_saved(
    tmp_path: Path, ranks: Callable[[int], RankPool], before: str, after: str
) -> None:
    """Two steps in one layout, the third in another: AdamW on the whole tensors. In the same layout, the same bits."""
    ranks(LAYOUTS[before].world_size).run(part_of_run, before, str(tmp_path), 0, 2, True)
    results = ranks(LAYOUTS[after].world_size).run(part_of_run, after, str(tmp_path), 2, STEPS, False)
    found = assemble(result["weights"] for result in results)
    torch.testing.assert_close(found, train_whole()[2], rtol=0, atol=WEIGHT_TOLERANCE)
    assert all((padding == 0).all() for result in results for padding in result["padding"])
    again = ranks(LAYOUTS[before].world_size).run(part_of_run, before, str(tmp_path), 2, STEPS, False)
    straight = ranks(LAYOUTS[before].world_size).run(part_of_run, before, str(tmp_path), 0, STEPS, False)
    for key in ("weights", "state"):
        assert_same_bits(assemble(r[key] for r in again), assemble(r[key] for r in straight))


def test_bf16_weights_and_their_masters_go_to_another_layout(tmp_path: Path, ranks: Callable[[int], RankPool]) -> None:
    saved = ranks(4).run(part_of_run, "tensor x data", str(tmp_path), 0, 2, True, torch.bfloat16)
    loaded = ranks(4).run(part_of_run, "isp x pipeline", str(tmp_path), 2, 2, False, torch.bfloat16)
    for key in ("weights", "state"):
        assert_same_bits(assemble(r[key] for r in loaded), assemble(r[key] for r in saved))


def test_every_element_is_written_once(tmp_path: Path, ranks: Callable[[int], RankPool]) -> None:
    """Of the norm, on all ranks, of key-value heads with copies, of a tied embedding on both ends, and of replicas."""
    for name in ("kv copies", "pipeline x tensor", "zero x replicas", "isp x replicas"):
        folder = tmp_path / name
        ranks(LAYOUTS[name].world_size).run(part_of_run, name, str(folder), 0, 1, True)
        metadata = dcp.FileSystemReader(folder / "1").read_metadata()
        for key in (
            f"{kind}/{n}" for kind in ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq") for n in GLOBAL_SHAPES
        ):
            count = torch.zeros(GLOBAL_SHAPES[key.split("/")[-1]])
            for index in metadata.storage_data:
                if index.fqn == key:
                    chunk = metadata.state_dict_metadata[key].chunks[index.index]  # type: ignore[union-attr,index]
                    count[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
            assert (count == 1).all(), (name, key)


# -- pipelines ---------------------------------------------------------------------------------------------------------


def pipeline_steps(run: Run, folder: str, start: int, stop: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Steps `start` to `stop` from the checkpoint of step `start`, unless that is 0; saved. Losses and weights."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    context = ParallelContext.create(ParallelLayout(world_size=world, pipeline=run.pipeline))
    engine = build_engine(run, context)
    trainer = trainer_of(engine, context)
    manager = CheckpointManager(folder)
    if start:
        manager.load(trainer, Path(folder) / str(start))
    losses = [float(engine.train_step(batch_of(step, context, 4), LR).loss) for step in range(start, stop)]
    trainer.state.step = stop
    manager.save(trainer)
    weights = {name: p.detach().clone() for chunk in engine.chunks for name, p in chunk.named_parameters()}
    context.close()
    return losses, weights


@pytest.mark.parametrize(("mode", "num_chunks"), [("1F1B", 1), ("1F1B", 2), ("ZBV", 2)])
def test_a_pipeline_and_one_process_load_each_others_checkpoints(
    tmp_path: Path, ranks: Callable[[int], RankPool], mode: str, num_chunks: int
) -> None:
    """A tied embedding on both ends; two steps in a pipeline, one in one process, one in the pipeline again."""
    model = {"num_layers": 4, "tie_word_embeddings": True}
    alone, pipeline = Run(model=model), Run(mode, 2, num_chunks, model=model)
    straight, _ = pipeline_steps(alone, str(tmp_path / "straight"), 0, 4)
    folder = str(tmp_path / "parts")
    first = ranks(2).run(pipeline_steps, pipeline, folder, 0, 2)
    middle, weights = pipeline_steps(alone, folder, 2, 3)
    last = ranks(2).run(pipeline_steps, pipeline, folder, 3, 4)
    assert {name for _, on_rank in first for name in on_rank} == weights.keys()
    torch.testing.assert_close(first[0][0] + middle + last[0][0], straight, rtol=1e-5, atol=0)
    # In the same layout: the same bits as without the pause.
    again = ranks(2).run(pipeline_steps, pipeline, str(tmp_path / "again"), 0, 3)
    paused = ranks(2).run(pipeline_steps, pipeline, folder, 2, 3)
    for (losses, after), (paused_losses, paused_after) in zip(again, paused, strict=True):
        assert losses[2:] == paused_losses
        assert_same_bits(after, paused_after)


# -- whole runs under FSDP --------------------------------------------------------------------------------------------


def fsdp_both_ways(folder: str, zero: int, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    straight = train(f"{folder}/straight", 6, zero=zero, dtype=dtype, fsdp=True)
    first = train(f"{folder}/parts", 3, every=3, zero=zero, dtype=dtype, fsdp=True)
    second = train(f"{folder}/parts", 6, f"{folder}/parts/3", zero=zero, dtype=dtype, fsdp=True)
    second["losses"] = first["losses"] + second["losses"]
    return straight, second


@pytest.mark.parametrize(
    ("world", "zero", "dtype"), [(2, -1, "torch.float32"), (2, -1, "torch.bfloat16"), (4, 2, "torch.float32")]
)
def test_fsdp_resumes_bit_for_bit(
    tmp_path: Path, ranks: Callable[[int], RankPool], world: int, zero: int, dtype: str
) -> None:
    for straight, resumed in ranks(world).run(fsdp_both_ways, str(tmp_path), zero, dtype):
        assert straight["losses"] == resumed["losses"]
        assert_same_bits(straight["weights"], resumed["weights"])


def some_steps(folder: str, stop: int, resume: str | None, zero: int, fsdp: bool) -> dict[str, Any]:
    return train(folder, stop, resume, every=3, zero=zero, fsdp=fsdp)


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, -1, True), (1, -1, False)), ((1, -1, False), (4, 2, True)), ((2, -1, False), (2, -1, True))],
    ids=["FSDP to one", "one to hybrid FSDP", "ZeRO to FSDP"],
)
def test_fsdp_and_other_layouts_load_each_others_checkpoints(
    tmp_path: Path, ranks: Callable[[int], RankPool], before: tuple[int, int, bool], after: tuple[int, int, bool]
) -> None:
    straight = train(tmp_path / "straight", 6)

    def on(place: tuple[int, int, bool], stop: int, resume: str | None) -> dict[str, Any]:
        world, zero, fsdp = place
        args = (str(tmp_path / "parts"), stop, resume, zero, fsdp)
        return some_steps(*args) if world == 1 else ranks(world).run(some_steps, *args)[0]

    first = on(before, 3, None)
    second = on(after, 6, str(tmp_path / "parts" / "3"))
    torch.testing.assert_close(first["losses"] + second["losses"], straight["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(first["norms"] + second["norms"], straight["norms"], rtol=1e-4, atol=0)
