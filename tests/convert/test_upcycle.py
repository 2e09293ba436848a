"""A mixture of experts made of a dense checkpoint computes the dense model's function; bad input is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import start_training, write_config
from helpers.model import TINY, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.checkpoint.load_model import load_model_for_inference
from internlm.checkpoint.tensor_files import TensorReader, write_weights
from internlm.checkpoint.weight_source import LazyTensor
from internlm.cli import main
from internlm.config.schema import Config
from internlm.convert.upcycle import PAIRS, Upcycling, upcycle
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parallelize import parallelize
from internlm.model.registry import build_model
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.storage import storage_path

GQA = {"num_kv_attention_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "INTERNLM": {},
    "INTERNLM2": GQA,
    "LLAMA2": {**GQA, "mlp_layer_fusion": True},
    "LLAMA3": {**GQA, "sliding_window": 4},  # Without use_sliding_window, Llama has no window.
    "MISTRAL": {**GQA, "sliding_window": 4},
    "QWEN2": {**GQA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "QWEN3": {**GQA, "head_dim": 12, "tie_word_embeddings": True},
}


def write_dense(folder: Path, model_type: str, dtype: str = "torch.float32", **keys: Any) -> nn.Module:
    """Write a checkpoint of a model with random norms and biases."""
    model: nn.Module = tiny_model(model_type, dtype=dtype, **keys)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(4)  # Tiny weights would hide differences in logits.
    config = Config.model_validate(
        {
            "model_type": model_type,
            "model": {**TINY, "dtype": dtype, **keys},
            "data": {"seq_len": 16, "micro_bsz": 1, "total_steps": 1},
            "ckpt": {"enable_save_ckpt": False},
        }
    )
    tensors = {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor.detach())  # type: ignore[misc]
        for name, tensor in model.named_parameters()
    }
    write_weights(storage_path(folder), tensors, config=config)
    return model


def loss_of(model: Any) -> Tensor:
    ids = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(24).expand(2, -1)
    with torch.no_grad():
        logits = model.logits(model(ids, positions))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def read_all(path: Path) -> dict[str, Tensor]:
    reader = TensorReader(storage_path(path))
    return {name: reader.read(name) for name in reader.names()}


@pytest.mark.parametrize("shared", [False, True], ids=["routed", "with a shared expert"])
@pytest.mark.parametrize("model_type", PAIRS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("torch.float64", 1e-12), ("torch.float32", 2e-6)])
def test_the_fresh_mixture_has_the_loss_of_the_dense_model(
    tmp_path: Path, model_type: str, shared: bool, dtype: str, tolerance: float
) -> None:
    dense = write_dense(tmp_path / "dense", model_type, dtype, **FAMILIES[model_type])
    settings = Upcycling(5, 3, shared_expert=shared, dense_layers=int(model_type == "QWEN2"))
    made = upcycle(storage_path(tmp_path / "dense"), storage_path(tmp_path / "new"), settings)
    mixture, config = load_model_for_inference(tmp_path / "new")
    assert (config.model_type, made.model_type) == (PAIRS[model_type],) * 2
    assert config.model.num_experts == made.keys["num_experts"] == 5
    expected, found = loss_of(dense), loss_of(mixture)
    assert expected.dtype == found.dtype == getattr(torch, dtype.removeprefix("torch."))
    assert expected > 1 and abs(found - expected) <= tolerance * expected
    assert any(".shared." in name for name, _ in mixture.named_parameters()) == shared


@pytest.mark.parametrize("fused", [False, True])
def test_every_expert_is_the_dense_block(tmp_path: Path, fused: bool) -> None:
    write_dense(tmp_path / "dense", "MISTRAL", "torch.bfloat16", mlp_layer_fusion=fused)
    upcycle(storage_path(tmp_path / "dense" / "0"), storage_path(tmp_path / "new"), Upcycling(4, 2, shared_expert=True))
    dense, new = read_all(tmp_path / "dense" / "0"), read_all(tmp_path / "new" / "0")
    for layer in range(2):
        block = f"layers.{layer}.feed_forward."
        names = ["w13"] if fused else ["w1", "w3"]
        w13 = torch.cat([dense[f"{block}{name}.weight"] for name in names])
        w2 = dense[f"{block}w2.weight"]
        assert torch.equal(new[f"{block}experts.w13"], w13.expand(4, *w13.shape))
        assert torch.equal(new[f"{block}experts.w2"], w2.expand(4, *w2.shape))
        for name in (*names, "w2"):
            assert torch.equal(new[f"{block}shared.{name}.weight"], dense[f"{block}{name}.weight"])
    for name in dense:
        if ".feed_forward." not in name:
            assert torch.equal(new[name], dense[name]), name


def test_routers_are_those_of_a_new_run_with_the_seed(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense", "QWEN3")
    upcycle(storage_path(tmp_path / "dense"), storage_path(tmp_path / "new"), Upcycling(4, 2, seed=7))
    model, config = load_model_for_inference(tmp_path / "new")
    with torch.device("meta"):
        fresh = build_model(config.model_type, config.model)
    parallelize(fresh, ParallelContext.create(device="cpu"), seed=7)
    expected = dict(fresh.named_parameters())
    routers = {name: tensor for name, tensor in model.named_parameters() if ".router." in name}
    assert len(routers) == 2
    for name, tensor in routers.items():
        assert torch.equal(tensor, expected[name]) and tensor.dtype == torch.float32


def test_noise_is_relative_to_each_weight_and_follows_the_seed(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense", "QWEN2")
    dense = read_all(tmp_path / "dense" / "0")
    made = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        upcycle(storage_path(tmp_path / "dense"), storage_path(tmp_path / name), Upcycling(3, 2, noise=0.25, seed=seed))
        made[name] = read_all(tmp_path / name / "0")
    block = "layers.1.feed_forward."
    for part, names in (("w13", ("w1", "w3")), ("w2", ("w2",))):
        a, b, c = (made[name][f"{block}experts.{part}"] for name in "abc")
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert not torch.equal(a[0], a[1])
        for number, name in enumerate(names):
            weight = dense[f"{block}{name}.weight"]
            added = a.chunk(len(names), dim=1)[number] - weight
            torch.testing.assert_close(added.std(), 0.25 * weight.std(), rtol=0.03, atol=0)
            assert abs(added.mean()) < 0.02 * weight.std()


def test_one_expert_is_computed_at_a_time_and_a_block_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dense(tmp_path / "dense", "MISTRAL")
    read, names = TensorReader.read, []

    def watch(self: TensorReader, name: str) -> Tensor:
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(TensorReader, "read", watch)
    monkeypatch.setattr(torch, "stack", None)
    upcycle(storage_path(tmp_path / "dense"), storage_path(tmp_path / "new"), Upcycling(8, 2))
    assert sorted(names) == sorted(set(names)) == sorted(read_all(tmp_path / "dense" / "0"))[: len(names)]


# -- the command -------------------------------------------------------------------------------------------------------

FROM_MIXTURE = """
model_type = "{model_type}"
model.update({keys})
model.pop("num_kv_attention_heads")
model.update(vocab_size=97, hidden_size=48, num_attention_heads=6, intermediate_size=88)
data.update(total_steps=1)
lr_scheduler.update(total_steps=1)
adam.update(lr=0.0)
ckpt.update(load_ckpt_info=dict(path="{path}", content=("model",)), checkpoint_every=1)
"""


def test_a_run_starts_from_the_checkpoint_with_the_printed_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dense(tmp_path / "dense", "INTERNLM")
    arguments = [
        "--ckpt",
        str(tmp_path / "dense"),
        "--out",
        str(tmp_path / "new"),
        "--num-experts",
        "4",
        "--top-k",
        "1",
    ]
    assert main(["convert", "upcycle", *arguments]) == 0
    out = capsys.readouterr().out
    assert "notice: with top_k = 1" in out
    path = out.splitlines()[-1]
    assert path == str(tmp_path / "new" / "0")
    keys = dict(line.strip().removeprefix("model.").split(" = ") for line in out.splitlines() if " model." in line)
    assert keys == {"num_experts": "4", "moe_type": "'Dropless'"}
    assert "  model_type = 'INTERNLM_MoE'" in out and f"load_ckpt_info = dict(path='{path}'" in out
    more = FROM_MIXTURE.replace("{keys}", ", ".join(f"{name}={value}" for name, value in keys.items()))
    config = write_config(tmp_path, more.replace("{model_type}", "INTERNLM_MoE").replace("{path}", path))
    run = start_training(["--config", config, "--run-dir", tmp_path / "run"], tmp_path / "out.txt")
    assert run.wait() == 0, (tmp_path / "out.txt").read_text()
    trained, new = read_all(tmp_path / "checkpoints" / "1"), read_all(Path(path))
    assert trained.keys() == new.keys()
    assert all(torch.equal(trained[name], new[name]) for name in new)


def test_the_tokenizer_stays_with_the_weights(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense", "QWEN3")
    hf = tmp_path / "dense" / "0" / "hf"
    hf.mkdir()
    files = {"tokenizer.json": "{}", "generation_config.json": "{}", "modeling_x.py": "", "tokenization_x.py": ""}
    for name, text in {**files, "config.json": json.dumps({"eos_token_id": 3, "model_type": "qwen3"})}.items():
        (hf / name).write_text(text)
    (tmp_path / "dense" / "0" / "data_tokenizer.json").write_text('{"a": 1}')
    upcycle(storage_path(tmp_path / "dense"), storage_path(tmp_path / "new"), Upcycling(4, 2))
    new = tmp_path / "new" / "0"
    kept = {"tokenizer.json", "generation_config.json", "tokenization_x.py", "config.json"}
    assert {path.name for path in (new / "hf").iterdir()} == kept
    assert json.loads((new / "hf" / "config.json").read_text()) == {"eos_token_id": 3}
    assert (new / "data_tokenizer.json").read_text() == '{"a": 1}'


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_experts": 1, "top_k": 1}, "--num-experts 1: a mixture has at least 2"),
        ({"num_experts": 4, "top_k": 5}, "--top-k 5: must be from 1 to --num-experts 4"),
        ({"num_experts": 4, "top_k": 0}, "--top-k 0"),
        ({"num_experts": 4, "top_k": 2, "noise": -0.1}, "--noise -0.1"),
        ({"num_experts": 4, "top_k": 2, "noise": float("nan")}, "--noise nan"),
    ],
)
def test_bad_settings_are_named(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Upcycling(**keys)


def refused(tmp_path: Path, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        upcycle(storage_path(tmp_path / "dense"), storage_path(tmp_path / "new"), Upcycling(4, 2))
    return str(caught.value)


def test_models_without_a_mixture_are_named(tmp_path: Path) -> None:
    write_dense(tmp_path / "a" / "dense", "GEMMA")
    assert "otherwise like model_type = 'GEMMA'. Supported: INTERNLM, INTERNLM2, LLAMA2" in refused(
        tmp_path / "a", ConfigError
    )
    write_dense(tmp_path / "b" / "dense", "MISTRAL", mlp_bias=True)
    assert "model.mlp_bias" in refused(tmp_path / "b", ConfigError)
    write_dense(tmp_path / "c" / "dense", "MIXTRALMOE", num_experts=4, top_k=2, moe_type="Dropless")
    assert "is a mixture of 4 experts already" in refused(tmp_path / "c", ConfigError)
    assert "dense" in refused(tmp_path / "d", CheckpointError)


def test_nothing_is_replaced_and_damage_is_named(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense", "MISTRAL")
    upcycle(storage_path(tmp_path / "dense"), storage_path(tmp_path / "new"), Upcycling(4, 2))
    assert "already exists; give another --out" in refused(tmp_path, CheckpointError)
    (tmp_path / "new").rename(tmp_path / "other")
    data = next(path for path in (tmp_path / "dense" / "0").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    assert "damaged" in refused(tmp_path, CheckpointError)
    assert not (tmp_path / "new" / "0").exists()
