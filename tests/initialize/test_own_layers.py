"""Layers of a user's own model take part by protocol; layers of a decoder may differ by number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers.commands import write_config
from helpers.ranks import RankPool
from helpers.tiny import tiny_config
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.config.loader import load_config
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.fsdp import local_tensor
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.core.trainer import Trainer
from internlm.initialize.build import build_layout, build_trainer, check_buildable
from internlm.initialize.stages import build_meta_model
from internlm.model import registry
from internlm.model.architecture import Architecture, FamilyDefaults
from internlm.model.decoder import Decoder
from internlm.model.initialization import Normal, set_initializer
from internlm.model.layer_kinds import LayerKind
from internlm.model.layer_protocol import LayeredModel, RecomputableLayer, run_layers
from internlm.model.modules.linear import Linear
from internlm.model.offload import Offloading
from internlm.model.recompute import SavePolicy, TensorStore, recomputed
from internlm.model.roles import Role
from internlm.utils.errors import ConfigError


class MixerLayer(nn.Module):
    """A token-wise feed-forward, with nothing of `internlm.model.decoder`."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = Linear(width, 2 * width, bias=False, dtype=dtype)
        self.down = Linear(2 * width, width, bias=False, dtype=dtype)
        self.save_policy: SavePolicy = "everything"
        self.store: TensorStore | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        return recomputed(self.compute, self.save_policy, self.store)(hidden)

    def compute(self, hidden: Tensor, *inputs: Any) -> Tensor:
        return hidden + self.down(F.gelu(self.up(hidden)))


class Mixer(nn.Module):
    """A model whose layers are found by protocol."""

    roles: ClassVar[dict[str, Role]] = {
        "tok_embeddings": Role.EMBEDDING,
        "layers.*.up": Role.COLUMN,
        "layers.*.down": Role.ROW,
        "output": Role.HEAD,
    }

    def __init__(self, config: Any) -> None:
        super().__init__()
        dtype = config.torch_dtype
        self.vocab_size = config.vocab_size
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(MixerLayer(config.hidden_size, dtype) for _ in range(config.num_layers))
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        self.offloading: Offloading | None = None
        for parameter in self.parameters():
            set_initializer(parameter, Normal(0.05))

    def numbered_layers(self) -> dict[int, MixerLayer]:
        return dict(enumerate(self.layers))  # type: ignore[arg-type]

    def forward(self, input_ids: Tensor, position_ids: Tensor, varlen: Any = None, cache: Any = None) -> Tensor:
        hidden = self.tok_embeddings(input_ids)
        return run_layers(self.numbered_layers().items(), hidden, offloading=self.offloading)

    def head_weight(self) -> Tensor:
        weight: Tensor = self.output.weight
        return weight


class ReluFeedForward(nn.Module):
    """A feed-forward without a gate."""

    def __init__(self, architecture: Architecture, layer: int) -> None:
        super().__init__()
        a = architecture
        self.up = Linear(a.hidden_size, 3 * a.hidden_size, bias=False, dtype=a.dtype)
        self.down = Linear(3 * a.hidden_size, a.hidden_size, bias=False, dtype=a.dtype)
        for linear in (self.up, self.down):
            set_initializer(linear.weight, Normal(0.05))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(x)))
        return out


RELU = LayerKind(
    "relu", feed_forward=ReluFeedForward, roles={"feed_forward.up": Role.COLUMN, "feed_forward.down": Role.ROW}
)


@pytest.fixture(autouse=True)
def own_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    register()
    yield
    for name in ("MIXER", "MIXED"):
        registry._BUILDERS.pop(name, None)


def register() -> None:
    registry.known_models()
    registry._BUILDERS["MIXER"] = lambda config, norm_dtype: Mixer(config)

    def mixed(config: Any, norm_dtype: torch.dtype | None) -> Decoder:
        architecture = Architecture.resolve(config, FamilyDefaults(), norm_dtype=norm_dtype)
        return Decoder(dataclasses.replace(architecture, layer_kinds={1: RELU}))

    registry._BUILDERS["MIXED"] = mixed


def new(folder: Path, *overrides: str) -> Trainer:
    register()
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    every = ("ckpt.enable_save_ckpt=False", "model.num_layers=3", "data.total_steps=3")
    loaded = load_config(write_config(folder), [*every, *overrides], world_size=world)
    context = ParallelContext.create(build_layout(loaded.config, world))
    return build_trainer(loaded.config, context, folder / "run")


def losses_and_weights(folder: str, *overrides: str) -> tuple[list[float], dict[str, Tensor]]:
    trainer = new(Path(folder), *overrides)
    losses = [
        float(trainer.engine.train_step(batch, 1e-2).loss)
        for _, batch in zip(range(3), trainer.train_loader, strict=False)
    ]
    trainer.engine.optimizer.finish_gathering()
    weights: dict[str, Tensor] = {}
    for chunk in trainer.engine.chunks:
        for parameter in chunk.parameters():
            spec = shard_spec_of(parameter)
            whole = weights.setdefault(spec.name, torch.full(spec.global_shape, torch.nan))
            for box in spec.boxes:
                whole[box.global_slices()] = local_tensor(parameter)[box.local_slices()].detach()
    trainer.context.close()
    return losses, weights


def test_the_protocols_know_them() -> None:
    model = Mixer(load_config_model())
    assert isinstance(model, LayeredModel) and isinstance(model.layers[0], RecomputableLayer)
    assert not isinstance(nn.Linear(2, 2), RecomputableLayer)


def load_config_model() -> Any:
    return tiny_config()


@pytest.mark.parametrize(
    "keys",
    [
        ("model.checkpoint=1.0",),
        ("model.checkpoint=1.0", "model.checkpoint_save_policy=matmuls"),
        ("cpu_offloading.enable=True", "cpu_offloading.num_layers=2"),
    ],
)
@pytest.mark.parametrize("model_type", ["MIXER", "MIXED"])
def test_recomputation_and_offloading_change_no_bit(tmp_path: Path, model_type: str, keys: tuple[str, ...]) -> None:
    plain = losses_and_weights(str(tmp_path), f"model_type={model_type}")
    found = losses_and_weights(str(tmp_path), f"model_type={model_type}", *keys)
    assert found[0] == plain[0]
    for name, weight in plain[1].items():
        assert torch.equal(found[1][name], weight), name
    trainer = new(tmp_path, f"model_type={model_type}", *keys)
    model: Any = trainer.engine.chunks[0]
    policies = {layer.save_policy for layer in model.numbered_layers().values()}
    assert policies == ({"everything"} if "cpu" in keys[0] else {"matmuls" if len(keys) > 1 else "nothing"})
    assert (model.offloading is not None) == ("cpu" in keys[0])


@pytest.mark.parametrize(
    "layout",
    [
        "parallel.tensor=dict(size=2,mode='mtp')",
        "parallel.tensor=dict(size=2,mode='msp')",
        "parallel.tensor=dict(size=2,mode='isp') parallel.weight=dict(size=2)",
        "parallel.fsdp.enable=True data.micro_num=1",
    ],
)
@pytest.mark.parametrize("model_type", ["MIXER", "MIXED"])
def test_every_layout_equals_one_process(
    tmp_path: Path, model_type: str, layout: str, ranks: Callable[[int], RankPool]
) -> None:
    if model_type == "MIXER" and "isp" in layout:
        pytest.skip("attends to nothing, so that there is nothing to exchange")
    keys = (f"model_type={model_type}", "data.micro_num=2", "model.checkpoint=0.5")
    expected = losses_and_weights(str(tmp_path / "one"), *keys)
    found = ranks(2).run(losses_and_weights, str(tmp_path / "two"), *keys, *layout.split())
    torch.testing.assert_close(torch.tensor(found[0][0]), torch.tensor(expected[0]), rtol=1e-5, atol=0)
    for name, weight in expected[1].items():
        parts = [weights[name] for _, weights in found if name in weights]
        whole = parts[0].clone()
        for part in parts[1:]:
            whole = torch.where(whole.isnan(), part, whole)
        # AdamW divides by the root of squares: where a gradient is mostly rounding, an element may differ by its step.
        assert (whole - weight).norm() <= 1e-4 * weight.norm(), (name, (whole - weight).norm() / weight.norm())


def test_layers_of_another_kind_are_another_function() -> None:
    register()
    loaded = load_config_model()
    with torch.device("meta"):
        mixed, plain = (registry.build_model(name, loaded) for name in ("MIXED", "LLAMA2"))
    names = {name for name, _ in mixed.named_parameters()}
    assert "layers.1.feed_forward.up.weight" in names and "layers.0.feed_forward.w1.weight" in names
    assert mixed.architecture.function != plain.architecture.function


def test_a_budget_needs_layers_whose_size_is_known(tmp_path: Path) -> None:
    for model_type in ("MIXER", "MIXED"):
        with pytest.raises(ConfigError, match=r"model\.checkpoint_budget = 1\.0: the activations of a MIX"):
            new(tmp_path, f"model_type={model_type}", "model.checkpoint_budget=1.0")


def test_a_model_that_names_no_layers_cannot_recompute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Mixer, "numbered_layers")
    with pytest.raises(ConfigError, match="a MIXER does not expose its layers"):
        config = load_config(write_config(tmp_path), ["model_type=MIXER", "model.checkpoint=1.0"]).config
        check_buildable(config, 1)
    assert build_meta_model(load_config(write_config(tmp_path), ["model_type=MIXER"]).config) is not None
