"""Settings of the config, each through `build_trainer`: a few steps, against another way to compute the same."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import metrics_of, write_config
from helpers.ranks import RankPool
from helpers.runs import assert_same_bits, weights_of
from torch.nn import functional as F

from internlm.config.loader import load_config
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.trainer import Trainer
from internlm.data.batch import MicroBatch
from internlm.data.tokenized_files.writer import TokenizedWriter
from internlm.initialize.build import build_layout, build_trainer
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.solver.optimizer.state_form import StateForm

STEPS = 6


def new(folder: Path, run: str = "run", **changes: Any) -> Trainer:
    """A trainer of the tiny config that saves nothing; `changes` are keys with `__` for a dot."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    values = {"data__total_steps": STEPS, "ckpt__enable_save_ckpt": False, **changes}
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in values.items()]
    loaded = load_config(write_config(folder / run), overrides, world_size=world)
    context = ParallelContext.create(build_layout(loaded.config, world))
    return build_trainer(loaded.config, context, folder / run)


def run(folder: Path, name: str = "run", **changes: Any) -> list[dict[str, Any]]:
    """Train; the metrics of every step."""
    new(folder, name, **changes).fit()
    return metrics_of(folder / name)


def column(lines: list[dict[str, Any]], key: str) -> list[Any]:
    return [line[key] for line in lines]


def token_mean(lines: list[dict[str, Any]]) -> float:
    """The mean loss over the tokens of several steps."""
    valid = sum(column(lines, "valid_tokens"))
    return sum(line["loss"] * line["valid_tokens"] for line in lines) / valid


# -- which samples make a step --------------------------------------------------------------------------------------


def test_a_ramp_up_takes_the_same_samples_in_larger_and_larger_steps(tmp_path: Path) -> None:
    """With weights that stand still, the loss of a step is the mean over the tokens of its samples."""
    one_by_one = run(tmp_path, "plain", adam__lr=0, data__micro_num=1, data__total_steps=12)
    ramped = run(tmp_path, "ramp", adam__lr=0, data__micro_num=3, data__rampup_batch_size="1 1 2")
    assert column(ramped, "micro_num") == [1, 1, 2, 2, 3, 3]
    assert column(ramped, "num_consumed_samples") == [1, 2, 4, 6, 9, 12]
    assert column(ramped, "num_tokens") == [32, 32, 64, 64, 96, 96]
    ends = [0, *column(ramped, "num_consumed_samples")]
    for line, (first, end) in zip(ramped, itertools.pairwise(ends), strict=True):
        assert line["loss"] == pytest.approx(token_mean(one_by_one[first:end]), rel=1e-6)
        assert line["valid_tokens"] == sum(column(one_by_one[first:end], "valid_tokens"))


def test_skipped_batches_leave_no_trace_but_their_place(tmp_path: Path) -> None:
    """The fourth step is taken with the fourth batch on the weights of the first step."""
    lines = run(tmp_path, data__skip_batches="1-2,4")
    assert column(lines, "step") == [1, 4, 6]
    assert column(lines, "num_consumed_tokens") == [64, 256, 384]
    by_hand = new(tmp_path, "by_hand")
    batches = list(itertools.islice(iter(by_hand.train_loader), STEPS))
    for line, index in zip(lines, (0, 3, 5), strict=True):
        result = by_hand.engine.train_step(batches[index], by_hand.schedules["lr"](index))
        assert line["loss"] == float(result.loss)
        assert line["lr"] == by_hand.schedules["lr"](index)


@pytest.mark.parametrize("advance", ["step", "update"])
def test_skipped_updates_and_batches_move_the_schedules_on_only_if_asked(tmp_path: Path, advance: str) -> None:
    """The first updates overflow, and the seventh batch is skipped; a run in two parts does the same."""
    changes = {
        "model__dtype": "torch.float16",
        "grad_scaler__fp16__initial_scale": 2.0**21,
        "grad_scaler__hysteresis": 1,
        "adam__adam_beta2": 0.4,
        "adam__adam_beta2_c": 0.8,
        "data__skip_batches": "6",
        "data__total_steps": 10,
        "lr_scheduler__advance": advance,
    }
    lines = run(tmp_path, "straight", **changes)
    skipped = column(lines, "skipped")
    assert skipped[:3] == [1, 1, 1] and skipped[-4:] == [0, 0, 0, 0] and len(lines) == 9
    updates = [0, *itertools.accumulate(1 - int(each) for each in skipped)][:-1]
    positions = updates if advance == "update" else [line["step"] - 1 for line in lines]
    schedules = new(tmp_path, "schedules", **changes).schedules
    assert column(lines, "lr") == [schedules["lr"](position) for position in positions]
    assert column(lines, "adam_beta2") == [schedules["beta2"](position) for position in positions]
    assert len(set(positions)) > 4 and len(set(column(lines, "adam_beta2"))) > 4
    saving = {"ckpt__enable_save_ckpt": True, "ckpt__checkpoint_every": 100}
    for total_steps in (3, 8, 10):
        resumed = run(tmp_path, "parts", **(changes | saving | {"data__total_steps": total_steps}))
    for key in ("step", "lr", "adam_beta2", "loss", "loss_scale"):
        assert column(resumed, key) == column(lines, key)


def test_unpacked_rows_are_the_same_documents(tmp_path: Path) -> None:
    """Documents of full length: packed one after the other, or a row each, they are the same batch."""
    same = {"data__fixed_random_dataset_seqlen": True}
    packed = run(tmp_path, "packed", **same)
    unpacked = run(tmp_path, "unpacked", data__use_packed_dataset=False, **same)
    assert column(unpacked, "valid_tokens") == column(packed, "valid_tokens") == [60] * STEPS
    assert column(unpacked, "loss") == pytest.approx(column(packed, "loss"), rel=1e-5)


def test_short_unpacked_rows_are_padded_and_the_padding_is_not_seen(tmp_path: Path) -> None:
    trainer = new(tmp_path, data__use_packed_dataset=False)
    (micro, _) = next(iter(trainer.train_loader)).micro_batches
    assert micro.input_ids.shape == (2, 16) and micro.lengths is None
    losses, model = [], trainer.engine.model
    for ids, labels in zip(micro.input_ids, micro.labels, strict=True):
        length = int((labels >= 0).sum()) + 1
        alone = model(ids[None, :length], torch.arange(length)[None])
        losses.append(F.cross_entropy(model.logits(alone)[0], labels[:length], reduction="sum"))  # type: ignore[operator]
    assert loss_of(trainer, micro) == pytest.approx(float(sum(losses).detach()) / micro.num_valid_tokens, rel=1e-5)


def loss_of(trainer: Trainer, micro: MicroBatch) -> float:
    """The mean loss of one micro batch, by a step with learning rate 0."""
    batch = next(iter(trainer.train_loader))
    batch.micro_batches = [micro]
    return float(trainer.engine.train_step(batch, 0.0).loss)


def test_pack_sample_into_one_lets_attention_cross_documents(tmp_path: Path) -> None:
    """Its loss is that of whole rows; the labels stay those of the documents."""
    trainer = new(tmp_path, data__pack_sample_into_one=True)
    micro = next(m for batch in trainer.train_loader for m in batch.micro_batches if m.num_valid_tokens < 28)
    assert micro.lengths == (16, 16)
    rows, labels = micro.input_ids.view(2, 16), micro.labels.view(2, 16)
    model = trainer.engine.model
    hidden = model(rows, torch.arange(16).expand(2, 16))
    whole_rows = F.cross_entropy(model.logits(hidden).flatten(0, 1), labels.flatten())  # type: ignore[operator]
    assert loss_of(trainer, micro) == pytest.approx(float(whole_rows.detach()), rel=1e-5)

    cut = new(tmp_path, "cut")
    same = next(
        m for batch in cut.train_loader for m in batch.micro_batches if torch.equal(m.input_ids, micro.input_ids)
    )
    assert torch.equal(same.labels, micro.labels)
    assert same.lengths is not None and len(same.lengths) > 2
    assert abs(loss_of(cut, same) - float(whole_rows.detach())) > 1e-4


# -- numerics -------------------------------------------------------------------------------------------------------


def test_fp16_finds_its_scale_and_then_trains_like_fp32(tmp_path: Path) -> None:
    """From a scale that overflows: updates are skipped until it fits, and the rest equals an fp32 run without them."""
    lines = run(
        tmp_path, "half", model__dtype="torch.float16", grad_scaler__fp16__initial_scale=2.0**24,
        grad_scaler__hysteresis=1, grad_scaler__backoff_factor=2.0**-5, data__total_steps=8,
    )  # fmt: skip
    skipped = column(lines, "skipped")
    num_skipped = int(sum(skipped))
    assert 1 <= num_skipped <= 4
    assert skipped == [1] * num_skipped + [0] * (8 - num_skipped)
    assert column(lines, "inf_nan_skip_batches")[-1] == num_skipped
    assert column(lines, "loss_scale") == [2.0 ** (24 - 5 * min(step, num_skipped)) for step in range(8)]
    full = run(tmp_path, "full", data__total_steps=8, data__skip_batches=f"0-{num_skipped - 1}")
    # fp16 has 11 bits, and errors of a few roundings average over the tokens.
    assert column(lines[num_skipped:], "loss") == pytest.approx(column(full, "loss"), rel=2**-10)
    assert column(lines[num_skipped:], "grad_norm") == pytest.approx(column(full, "grad_norm"), rel=2**-6)


def test_bf16_with_and_without_fp32_norms_trains_like_fp32(tmp_path: Path) -> None:
    full = run(tmp_path, "full")
    plain = new(tmp_path, "plain", model__dtype="torch.bfloat16")
    mixed = new(tmp_path, "mixed", model__dtype="torch.bfloat16", use_fp32_norm=True)
    assert {p.dtype for p in plain.engine.model.parameters()} == {torch.bfloat16}
    for name, parameter in mixed.engine.model.named_parameters():
        assert parameter.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
    for trainer, name in ((plain, "plain"), (mixed, "mixed")):
        trainer.fit()
        # bf16 has 8 bits.
        assert column(metrics_of(tmp_path / name), "loss") == pytest.approx(column(full, "loss"), rel=2**-8)


def test_fp32_norms_resume_bit_for_bit(tmp_path: Path) -> None:
    """Buckets of two number formats, of which one is its own master."""
    changes = {
        "model__dtype": "torch.bfloat16", "use_fp32_norm": True, "ckpt__enable_save_ckpt": True,
        "hybrid_zero_optimizer__reduce_bucket_size": 3000,
    }  # fmt: skip
    straight = new(tmp_path, "straight", **changes)
    straight.fit()
    new(tmp_path, "parts", **changes, data__total_steps=3).fit()
    resumed = new(tmp_path, "parts", **changes)
    assert resumed.state.step == 3
    resumed.fit()
    assert_same_bits(weights_of(resumed.engine.model), weights_of(straight.engine.model))


@pytest.mark.parametrize("fraction", [0.5, True])
def test_recomputation_changes_no_bit(tmp_path: Path, fraction: float) -> None:
    plain, recomputed = run(tmp_path, "plain"), run(tmp_path, "recomputed", model__checkpoint=fraction)
    for key in ("loss", "grad_norm"):
        assert column(recomputed, key) == column(plain, key)


@pytest.mark.parametrize(
    ("smoothing", "z_coefficient"), [(0.1, 0.0), (0.0, 0.01), (0.1, 0.01)], ids=["smoothing", "z-loss", "both"]
)
def test_label_smoothing_and_z_loss_are_in_the_loss_but_not_in_the_perplexity(
    tmp_path: Path, smoothing: float, z_coefficient: float
) -> None:
    trainer = new(tmp_path, loss__label_smoothing=smoothing, loss__z_loss_coeff=z_coefficient, data__total_steps=1)
    model = trainer.engine.model
    batch = next(iter(new(tmp_path, "data").train_loader))
    total, plain = torch.zeros(()), torch.zeros(())
    for micro in batch.micro_batches:
        hidden = model(micro.input_ids, micro.position_ids, VarlenMetadata.of(micro.lengths))  # type: ignore[arg-type]
        logits = model.logits(hidden)[0][micro.labels[0] >= 0]  # type: ignore[operator]
        labels = micro.labels[0][micro.labels[0] >= 0]
        total += F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
        total += z_coefficient * logits.logsumexp(-1).square().sum()
        plain += F.cross_entropy(logits, labels, reduction="sum")
    gradients = torch.autograd.grad(total / batch.num_valid_tokens, list(model.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    trainer.fit()
    (line,) = metrics_of(tmp_path / "run")
    assert line["loss"] == pytest.approx(float(total.detach()) / batch.num_valid_tokens, rel=1e-6)
    assert line["loss_from_metric"] == pytest.approx(float(plain.detach()) / batch.num_valid_tokens, rel=1e-6)
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert line["loss"] > line["loss_from_metric"] or smoothing


def test_beta2_rises_on_its_schedule(tmp_path: Path) -> None:
    lines = run(tmp_path, beta2_scheduler__init_beta2=0.6, beta2_scheduler__c=0.8)
    assert column(lines, "adam_beta2") == pytest.approx([max(0.6, 1 - t**-0.8) for t in range(1, STEPS + 1)], rel=1e-12)
    assert column(lines, "loss") != column(run(tmp_path, "constant"), "loss")


# -- numbers --------------------------------------------------------------------------------------------------------


def test_rates_are_those_of_one_rank(tmp_path: Path, ranks: Callable[[int], RankPool]) -> None:
    lines, _ = ranks(2).run(run, tmp_path)
    for line in lines:
        assert line["tgs"] * line["total_time"] == pytest.approx(line["num_tokens"] / 2)
        assert line["real_tgs"] * line["total_time"] == pytest.approx(line["valid_tokens"] / 2)


# -- evaluation -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valid_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of documents of 1 to 40 tokens, in numbers that fill no batch; some tokens are masked."""
    folder = tmp_path_factory.mktemp("valid")
    random = np.random.default_rng(5)
    for name, count in (("books", 13), ("code/python", 6)):
        (folder / name).mkdir(parents=True)
        with TokenizedWriter(folder / name / "a.bin") as writer:
            for _ in range(count):
                ids = random.integers(1, 61, random.integers(1, 41))
                writer.write(np.where(random.random(ids.shape) < 0.2, -ids, ids))
    return folder


def test_what_may_end_a_run_comes_after_the_save(tmp_path: Path, valid_folder: Path) -> None:
    """The hooks are called in this order, and what the first ones have done is done."""
    trainer = new(tmp_path, ckpt__enable_save_ckpt=True, data__valid_folder=valid_folder, data__valid_every=2)
    names = [hook.name for hook in trainer.hooks]
    assert names.index("metrics_file") < names.index("checkpoint") < names.index("evaluation") < names.index("health")
    assert names[-1] == "health"


def evaluations(
    folder: Path, valid_folder: Path, run: str, packed: bool, data_ranks: int = 1, **layout: Any
) -> list[dict[str, float]]:
    """The val/ numbers of every evaluation of a run of five steps, evaluated every two."""
    trainer = new(
        folder, run, data__total_steps=5, data__micro_num=4 // data_ranks, data__valid_folder=valid_folder,
        data__valid_every=2, data__use_packed_dataset=packed, hybrid_zero_optimizer__overlap_sync_param=True,
        data__fixed_random_dataset_seqlen=True, data__valid_by_position=True, **layout,
    )  # fmt: skip
    found: list[dict[str, float]] = []
    original = trainer.evaluate
    trainer.evaluate = lambda: found.append(original()) or found[-1]  # type: ignore[method-assign,func-returns-value]
    trainer.fit()
    return found


LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"data_ranks": 2},
    "mtp": {"parallel__tensor": {"size": 2, "mode": "mtp"}},
    "isp": {"parallel__tensor": {"size": 2, "mode": "isp"}},
    "pipeline": {"parallel__pipeline__size": 2},
}


@pytest.mark.parametrize(
    "packed, layout", [(True, "data"), (False, "data"), (True, "isp"), (False, "mtp"), (True, "pipeline")]
)
def test_valid_numbers_do_not_depend_on_ranks(
    tmp_path: Path, valid_folder: Path, ranks: Callable[[int], RankPool], packed: bool, layout: str
) -> None:
    single = evaluations(tmp_path, valid_folder, "one", packed)
    assert len(single) == 3  # after steps 2, 4 and the last
    sets = ("books", "code/python")
    names = {f"val/{name}_{kind}" for name in sets for kind in ("loss", "acc", "plex")}
    names |= {
        f"val/{name}_{kind}_by_position/{positions}"
        for name in sets
        for kind in ("loss", "tokens")
        for positions in ("0", "1", "2-3", "4-7", "8-15")
    }
    assert all(results.keys() == names for results in single)
    for results in ranks(2).run(partial(evaluations, **LAYOUTS[layout]), tmp_path, valid_folder, "two", packed):
        for ours, theirs in zip(results, single, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
    on_file = [{k: v for k, v in line.items() if k.startswith("val/")} for line in metrics_of(tmp_path / "two")]
    assert [bool(values) for values in on_file] == [False, True, False, True, True]
    assert on_file[-1] == pytest.approx(single[-1], rel=1e-5)


def test_an_evaluation_is_the_mean_over_every_document(tmp_path: Path, valid_folder: Path) -> None:
    """Each document cut every 16 tokens and run alone, without packing, batches or padding."""
    trainer = new(tmp_path, data__valid_folder=valid_folder, data__valid_every=1, data__valid_by_position=True)
    model = trainer.engine.model
    results = trainer.evaluate()
    for name in ("books", "code/python"):
        losses, hits, positions = [], [], []
        for line in (valid_folder / name / "a.bin").read_text().splitlines():
            signed = torch.tensor(json.loads(line)["tokens"])
            for start in range(0, len(signed), 16):
                ids = signed[start : start + 16].abs()
                labels = signed[start + 1 : start + 17]
                with torch.no_grad():
                    logits = model.logits(model(ids[None], torch.arange(len(ids))[None]))[0][: len(labels)]  # type: ignore[operator]
                kept = labels > 0
                losses.append(F.cross_entropy(logits, labels.abs(), reduction="none")[kept])
                hits.append((logits.argmax(-1) == labels)[kept])
                positions.append(torch.arange(len(labels))[kept])
        mean = torch.cat(losses).double().mean()
        assert results[f"val/{name}_loss"] == pytest.approx(float(mean), rel=1e-6)
        assert results[f"val/{name}_plex"] == pytest.approx(float(mean.exp()), rel=1e-5)
        assert results[f"val/{name}_acc"] == pytest.approx(float(torch.cat(hits).double().mean()), abs=1e-12)
        position = torch.cat(positions)
        for bucket, (first, last) in {"0": (0, 0), "1": (1, 1), "2-3": (2, 3), "8-15": (8, 15)}.items():
            inside = torch.cat(losses)[(position >= first) & (position <= last)].double()
            assert results[f"val/{name}_loss_by_position/{bucket}"] == pytest.approx(float(inside.mean()), rel=1e-6)
            assert results[f"val/{name}_tokens_by_position/{bucket}"] == len(inside)


# -- how the optimizer's state is kept ------------------------------------------------------------------------------


def test_the_keys_of_the_optimizer_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reaches the optimizer; an offloaded state trains bit for bit as one that is not, and says what it saves."""
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    keys = {
        "model__dtype": "torch.bfloat16",
        "hybrid_zero_optimizer__grad_accumulation_dtype": "torch.bfloat16",
        "adam__moments_dtype": "torch.bfloat16",
    }
    resident = run(tmp_path, "resident", **keys)
    assert "saves no memory" not in caplog.text
    trainer = new(tmp_path, "offloaded", hybrid_zero_optimizer__offload_optimizer=True, **keys)
    assert "hybrid_zero_optimizer.offload_optimizer saves no memory: the device is the host" in caplog.text
    assert isinstance(trainer.engine.optimizer, HybridZeroOptimizer)
    assert trainer.engine.optimizer.form == StateForm(torch.bfloat16, torch.bfloat16, is_offloaded=True)
    trainer.fit()
    assert column(metrics_of(tmp_path / "offloaded"), "loss") == column(resident, "loss")
    plain = run(tmp_path, "plain", model__dtype="torch.bfloat16")
    # The first loss is that of the same weights; later ones are not those of a run in fp32.
    assert column(plain, "loss")[0] == column(resident, "loss")[0]
    assert column(plain, "loss") != column(resident, "loss")
