"""Parameter groups: decay, learning rate and frozen weights by name, in every layout, against torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import write_config
from helpers.ranks import RankPool
from torch import Tensor, nn

from internlm.checkpoint.tensor_files import TensorReader
from internlm.cli import main
from internlm.config.loader import load_config
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.fsdp import local_tensor, reshard
from internlm.core.parallel.shard_spec import ShardSpec, attach_shard_spec, shard_spec_of
from internlm.initialize.build import build_layout, build_trainer
from internlm.solver.optimizer.parameter_groups import ParameterGroup, check_groups, options_of
from internlm.utils.errors import ConfigError
from internlm.utils.storage import storage_path

GROUPS = """
optimizer = dict(groups=[
    dict(match="*norm*", weight_decay=0.3),
    dict(match="layers.1.*", lr_factor=0.5),
    dict(match="layers.0.attention.*", freeze=True),
    dict(match="tok_embeddings.*", freeze=True),
])
"""
FROZEN = ("layers.0.attention.", "tok_embeddings.")
FIRST_STAGE = (
    'optimizer = dict(groups=[dict(match="tok_embeddings.*", freeze=True), dict(match="layers.0.*", freeze=True)])\n'
)


@dataclass
class Outcome:
    """Of a run: whole weights before and after, norms, and the keys of the optimizer's state."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    norms: list[float]
    losses: list[float]
    states: set[str]
    gradient_elements: int


def train(config: Path, overrides: tuple[str, ...], folder: str) -> Outcome:
    """A run of three steps on this rank; weights as far as it holds them whole or in boxes."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    loaded = load_config(config, overrides, world_size=world).config
    context = ParallelContext.create(build_layout(loaded, world))
    trainer = build_trainer(loaded, context, Path(folder))
    before = weights_of(trainer)
    norms, losses = [], []
    for step, batch in zip(range(3), trainer.train_loader, strict=False):
        result = trainer.engine.train_step(batch, {"lr": 1e-2 / (1 + step)})
        norms.append(float(result.grad_norm))
        losses.append(float(result.loss))
    trainer.engine.optimizer.finish_gathering()
    optimizer: Any = trainer.engine.optimizer
    found = Outcome(
        before,
        weights_of(trainer),
        norms,
        losses,
        {key for key, _, _ in optimizer.sharded_state()},
        sum(view.numel() for bucket in optimizer.buckets for view in bucket.grad_views),
    )
    context.close()
    return found


def weights_of(trainer: Any) -> dict[str, Tensor]:
    """Name -> this rank's boxes, put into tensors of NaN of the global shape."""
    found: dict[str, Tensor] = {}
    for chunk in trainer.engine.chunks:
        reshard(chunk)
        for parameter in chunk.parameters():
            spec = shard_spec_of(parameter)
            whole = found.setdefault(spec.name, torch.full(spec.global_shape, torch.nan))
            for box in spec.boxes:
                whole[box.global_slices()] = local_tensor(parameter)[box.local_slices()].detach()
    return found


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The whole weights of all ranks."""
    whole: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            known = whole.setdefault(name, tensor.clone())
            missing = known.isnan()
            known[missing] = tensor[missing]
    return whole


def with_groups(folder: Path, more: str = GROUPS) -> Path:
    return write_config(
        folder, "\nadam = dict(lr=1e-2, weight_decay=0.1)\nckpt = dict(enable_save_ckpt=False)\n" + more
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("alone")
    return train(with_groups(folder), ("data.micro_num=4", "model.num_layers=2"), str(folder / "run"))


def test_groups_in_one_process_equal_torch(tmp_path: Path, alone: Outcome) -> None:
    """torch.optim.AdamW with parameter groups, from the gradients of the same model."""
    config = load_config(with_groups(tmp_path), ("data.micro_num=4", "model.num_layers=2")).config
    context = ParallelContext.create()
    trainer = build_trainer(config, context, tmp_path / "run")
    model = trainer.engine.chunks[0]
    groups = []
    for name, parameter in model.named_parameters():
        lr_factor = 0.5 if name.startswith("layers.1.") else 1.0
        # A group replaces the one before: norms of layer 1 decay as one-dimensional weights do without a group.
        decay = 0.3 if "norm" in name and not name.startswith("layers.1.") else (0.1 if parameter.ndim > 1 else 0.0)
        if name.startswith(FROZEN):
            continue
        weight = nn.Parameter(parameter.detach().clone())
        groups.append({"params": [weight], "name": name, "weight_decay": decay, "factor": lr_factor})
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    clip = config.hybrid_zero_optimizer.clip_grad_norm
    for step, batch in zip(range(3), trainer.train_loader, strict=False):
        result = trainer.engine.train_step(batch, {"lr": 1e-2 / (1 + step)})
        gradients = {name: pieces for name, _, pieces in trainer.engine.optimizer.sharded_gradients()}
        square = 0.0
        for group in adamw.param_groups:
            group["lr"] = 1e-2 / (1 + step) * group["factor"]
            weight, pieces = group["params"][0], gradients[group["name"]]
            weight.grad = torch.empty_like(weight)
            for box, piece in pieces:
                weight.grad[box.global_slices()] = piece
            square += float(weight.grad.double().square().sum())
        assert square**0.5 == pytest.approx(min(float(result.grad_norm), clip), rel=1e-4)
        adamw.step()
    for group in adamw.param_groups:
        found = alone.after[group["name"]]
        torch.testing.assert_close(found, group["params"][0].detach(), rtol=1e-5, atol=1e-6)


def test_frozen_weights_stay_and_have_no_state(alone: Outcome) -> None:
    frozen = {name for name in alone.before if name.startswith(FROZEN)}
    assert frozen and len(frozen) < len(alone.before)
    for name, before in alone.before.items():
        assert torch.equal(before, alone.after[name]) == (name in frozen), name
    assert {key.split("/", 1)[1] for key in alone.states} == set(alone.before) - frozen


@pytest.mark.parametrize(
    "layout",
    [
        "parallel.zero1.size=2",
        "parallel.tensor=dict(size=2,mode='mtp')",
        "parallel.tensor=dict(size=2,mode='msp')",
        "parallel.tensor=dict(size=2,mode='fsp')",
        "parallel.tensor=dict(size=2,mode='isp') parallel.weight=dict(size=2,overlap=True)",
        "parallel.pipeline=dict(size=2)",
        "parallel.pipeline=dict(size=2,mode='ZBH1')",
        "parallel.fsdp.enable=True",
        "hybrid_zero_optimizer.overlap_sync_grad=True hybrid_zero_optimizer.overlap_sync_param=True",
    ],
)
def test_every_layout_equals_one_process(
    layout: str, tmp_path: Path, alone: Outcome, ranks: Callable[[int], RankPool]
) -> None:
    micro = 4 if "tensor" in layout or "pipeline" in layout else 2
    overrides = (f"data.micro_num={micro}", "model.num_layers=2", *layout.split())
    found = ranks(2).run(train, with_groups(tmp_path), overrides, str(tmp_path / "run"))
    torch.testing.assert_close(torch.tensor(found[0].losses), torch.tensor(alone.losses), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(found[0].norms), torch.tensor(alone.norms), rtol=1e-5, atol=0)
    after = joined([outcome.after for outcome in found])
    assert set(after) == set(alone.after)
    for name, expected in alone.after.items():
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6, msg=name)
        if name.startswith(FROZEN):
            assert torch.equal(after[name], alone.before[name])
    assert set().union(*(outcome.states for outcome in found)) == alone.states


def test_a_stage_of_a_pipeline_may_be_frozen(tmp_path: Path, ranks: Callable[[int], RankPool]) -> None:
    overrides = ("data.micro_num=4", "model.num_layers=2")
    expected = train(with_groups(tmp_path / "one", FIRST_STAGE), overrides, str(tmp_path / "run"))
    config = with_groups(tmp_path / "two", FIRST_STAGE)
    for mode in ("1F1B", "ZBH1"):
        pipeline = f"parallel.pipeline=dict(size=2,mode='{mode}')"
        found = ranks(2).run(train, config, (*overrides, pipeline), str(tmp_path / f"run_{mode}"))
        assert found[0].gradient_elements == 0 and not found[0].states
        torch.testing.assert_close(torch.tensor(found[0].losses), torch.tensor(expected.losses), rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.tensor(found[1].norms), torch.tensor(expected.norms), rtol=1e-5, atol=0)


def test_frozen_weights_cost_no_memory(tmp_path: Path, alone: Outcome) -> None:
    whole = train(with_groups(tmp_path, ""), ("data.micro_num=4", "model.num_layers=2"), str(tmp_path / "run"))
    saved = sum(tensor.numel() for name, tensor in whole.before.items() if name.startswith(FROZEN))
    assert whole.gradient_elements - alone.gradient_elements == saved


def test_the_last_group_that_matches_applies() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    attach_shard_spec(parameter, ShardSpec.whole("layers.0.norm.weight", (2, 2)))
    groups = [ParameterGroup("*norm*", weight_decay=0.5, lr_factor=3.0), ParameterGroup("layers.0.*", lr_factor=2.0)]
    options = options_of(parameter, groups, 0.1, decay_all=False)
    assert (options.weight_decay, options.lr_factor) == (0.1, 2.0)


def test_patterns_that_match_nothing_are_errors() -> None:
    names = {"layers.0.norm.weight", "output.weight"}
    with pytest.raises(ConfigError, match=r"groups\[1\].match = 'outpt.\*' matches no parameter.*mean 'output.weight'"):
        check_groups([ParameterGroup("*"), ParameterGroup("outpt.*", freeze=True)], names)
    with pytest.raises(ConfigError, match="every parameter of the model is frozen"):
        check_groups([ParameterGroup("*", freeze=True)], names)
    check_groups([ParameterGroup("*", freeze=True), ParameterGroup("output.*")], names)
    for general in ("*", "output.*"):
        with pytest.raises(ConfigError, match=r"groups\[0\].match = 'output.*' has no effect: later groups match all"):
            check_groups([ParameterGroup("output.*", freeze=True), ParameterGroup(general)], names)


def test_a_dry_run_checks_the_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["train", "--config", str(write_config(tmp_path)), "--dry-run", "--set"]
    assert main([*run, 'optimizer.groups=[dict(match="outptu.*", freeze=True)]']) == 2
    assert "optimizer.groups[0].match = 'outptu.*' matches no parameter" in capsys.readouterr().err
    assert main([*run, 'optimizer.groups=[dict(match="output.*", freeze=True)]']) == 0
    assert "optimizer.groups freezes 1,952 parameters, in 1 tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ('[dict(match="*", freez=True)]', r"optimizer.groups\[0\].freez is not a known key. Did you mean 'freeze'?"),
        (
            '[dict(match="*", freeze=True, lr_factor=2)]',
            "a dict without weight_decay and lr_factor, as it sets freeze=True",
        ),
        ('[dict(match="*", weight_decay=float("inf"))]', r"groups\[0\].weight_decay = inf: it must be a finite number"),
        ('[dict(match="")]', r"groups\[0\].match = '': it must be a non-empty string"),
        ("[dict(freeze=True)]", r"optimizer.groups\[0\].match is missing"),
        ('[dict(match="*"), dict(match="*", lr_factor=-1)]', r"optimizer.groups\[1\].lr_factor = -1: it must be"),
        ('[dict(match="*", weight_decay="much")]', r"optimizer.groups\[0\].weight_decay = 'much': it must be"),
    ],
)
def test_mistakes_in_the_config_are_named(tmp_path: Path, groups: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(write_config(tmp_path, f"optimizer = dict(groups={groups})\n"))


def test_another_set_of_frozen_weights_on_resume(tmp_path: Path) -> None:
    """Unfrozen weights start with an empty state, frozen ones drop theirs; both are logged."""
    frozen = 'optimizer = dict(groups=[dict(match="layers.0.*", freeze=True)])\n'
    config = write_config(tmp_path, f'model["dtype"] = "torch.bfloat16"\n{frozen}')
    run = ["train", "--config", str(config), "--run-dir", str(tmp_path / "run"), "--set", "ckpt.checkpoint_every=2"]
    assert main([*run, "--set", "data.total_steps=2"]) == 0
    # In bf16 an update writes the masters, so that stale ones would show: with a learning rate of 0 nothing may change.
    other = 'optimizer.groups=[dict(match="output.*", freeze=True)]'
    still = ["--set", "adam.lr=0.0", "--set", "lr_scheduler.eta_min=0.0"]
    assert main([*run, "--set", "data.total_steps=4", "--set", other, *still]) == 0
    before, after = (TensorReader(storage_path(tmp_path / "checkpoints" / step)) for step in ("2", "4"))
    for name in before.names():
        assert torch.equal(before.read(name), after.read(name)), name
    log = (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert "start with an empty optimizer state, as the checkpoint has none for them: layers.0." in log
    assert "frozen now, so their optimizer state is not loaded: output.weight" in log


def test_a_projection_frozen_before_and_fused_with_trained_ones_now(tmp_path: Path) -> None:
    """The fused weight starts with an empty state, as a part of it has none; nothing is called frozen."""
    frozen = 'optimizer = dict(groups=[dict(match="layers.*.attention.wq.*", freeze=True)])\n'
    config = write_config(tmp_path, f'model_type = "LLAMA2"\n{frozen}')
    run = ["train", "--config", str(config), "--run-dir", str(tmp_path / "run"), "--set", "ckpt.checkpoint_every=2"]
    assert main([*run, "--set", "data.total_steps=2"]) == 0
    fused = ["--set", "model_type=INTERNLM2", "--set", "optimizer.groups=[]"]
    assert main([*run, "--set", "data.total_steps=3", *fused]) == 0
    log = (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert "as the checkpoint has none for them: layers.0.attention.wqkv.weight, layers.1.attention.wqkv.weight" in log
    assert "the optimizer state of 4 projections is not loaded, as the checkpoint lacks that of the proj" in log
    assert "frozen now" not in log


def test_the_layout_command_checks_the_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, 'optimizer = dict(groups=[dict(match="nothing.*", freeze=True)])\n')
    assert main(["layout", "--config", str(config), "--world-size", "1"]) == 2
    assert "optimizer.groups[0].match = 'nothing.*' matches no parameter" in capsys.readouterr().err
