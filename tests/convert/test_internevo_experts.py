"""Mixtures of experts that InternEvo saved come out bit for bit, whatever their layout; misfits are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.internevo_format import Checkpoint, Split, write
from helpers.internevo_models import MIXTURES, model_of, section_of

from internlm.checkpoint.load_model import load_model_for_inference
from internlm.checkpoint.tensor_files import TensorReader
from internlm.convert.from_internevo import import_internevo
from internlm.convert.internevo_experts import InternEvoExperts
from internlm.model.moe.capacity import Capacity
from internlm.model.moe.noise import RouterNoise
from internlm.model.moe.selection import Selection, selection_of
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.storage import storage_path

SPLITS: dict[str, Split] = {
    "a file for each expert": Split(),
    "four tensor ranks": Split(tp=4),
    "two tensor ranks, experts whole (no_tp)": Split(tp=2, expert_ranks=1),
    "three stages of 1, 1 and 2 layers": Split(tp=2, pp=3),
    "interleaved chunks": Split(pp=2, chunks=2),
    "chunks in lists, V": Split(pp=2, chunks=2, chunk_lists=True, v_shape=True),
    "isp": Split(wp=2),
    "isp, experts over more ranks": Split(wp=2, expert_ranks=4, pp=2),
    "older names": Split(tp=2, older_names=True, older_feed_forward=True, model_prefix=False),
    "grouped on one rank": Split(grouped=True),
    "grouped, two expert ranks, two stages": Split(grouped=True, ep=2, pp=2),
    "grouped, four expert ranks, tensor ranks": Split(grouped=True, ep=4, tp=2),
    "grouped, isp": Split(grouped=True, ep=2, wp=2),
    "grouped, isp, an expert over ranks": Split(grouped=True, ep=4, wp=2, expert_ranks=4),
    "grouped, isp, ranks end within experts": Split(grouped=True, ep=1, wp=1, expert_ranks=8),
}


def save(folder: Path, model_type: str, split: Split, **changes: Any) -> dict[str, torch.Tensor]:
    section = section_of(model_type, **changes)
    if split.chunks > 1:
        section["num_chunks"] = split.chunks
    keys = {name: value for name, value in section.items() if name != "moe_type"}
    state = model_of(model_type, {**keys, "moe_type": "Dropless"})
    return write(folder, state, Checkpoint(model_type, section), split)


def import_and_read(folder: Path, out: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    imported = import_internevo(folder, storage_path(out))
    reader = TensorReader(imported.path)
    return {name: reader.read(name) for name in reader.names()}, imported.notices


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize("model_type", MIXTURES)
def test_every_family_and_split_comes_back(tmp_path: Path, model_type: str, split: Split) -> None:
    state = save(tmp_path / "old", model_type, split)
    assert "layers.0.feed_forward.experts.w13" in state
    found, _ = import_and_read(tmp_path / "old", tmp_path / "new")
    assert_same(found, state)


@pytest.mark.parametrize("split", [Split(tp=2, pp=2), Split(grouped=True, wp=2, ep=2)], ids=["separate", "grouped"])
def test_dense_first_layers_come_back(tmp_path: Path, split: Split) -> None:
    """Files count the expert layers of a stage, the names in them all of its layers."""
    state = save(tmp_path / "old", "INTERNLM_MoE", split, first_k_dense_replace=1)
    assert "layers.0.feed_forward.w2.weight" in state and "layers.1.feed_forward.experts.w2" in state
    found, _ = import_and_read(tmp_path / "old", tmp_path / "new")
    assert_same(found, state)


def test_the_imported_checkpoint_is_one_that_runs(tmp_path: Path) -> None:
    section = section_of("QWEN2MOE", dtype=torch.float32)
    model = model_of("QWEN2MOE", section)
    write(tmp_path / "old", model, Checkpoint("QWEN2MOE", section), Split(tp=2, pp=2, ep=2, grouped=True))
    imported = import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))
    assert imported.layout.endswith("experts in 2 file(s) of 2 rank(s) for each layer")
    loaded, config = load_model_for_inference(tmp_path / "new")
    assert (config.model_type, config.model.num_experts, config.model.top_k) == ("QWEN2MOE", 4, 2)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(loaded(ids, ids), model(ids, ids), rtol=0, atol=0)


@pytest.mark.parametrize("split", [Split(wp=2, fused_gate_up=True), Split(tp=2)])
def test_a_fused_gate_comes_back(tmp_path: Path, split: Split) -> None:
    state = save(tmp_path / "old", "MIXTRALMOE", split, mlp_layer_fusion=True, num_shared_experts=1)
    assert "layers.0.feed_forward.shared.w13.weight" in state
    assert_same(import_and_read(tmp_path / "old", tmp_path / "new")[0], state)


@pytest.mark.parametrize("grouped", [False, True])
def test_square_weights_of_isp_need_the_key_of_grouped_gemms(tmp_path: Path, grouped: bool) -> None:
    """Neither shapes nor numbers of files show whether such weights are transposed."""
    split = Split(wp=2, ep=4, grouped=grouped)
    save(tmp_path / "unknown", "MIXTRALMOE", split, intermediate_size=32)
    assert "use_grouped_mlp" in refused(tmp_path / "unknown", tmp_path / "new")
    kwargs = {"use_grouped_mlp": grouped}
    state = save(tmp_path / "known", "MIXTRALMOE", split, intermediate_size=32, moe_layer_kwargs=kwargs)
    assert_same(import_and_read(tmp_path / "known", tmp_path / "new")[0], state)


@pytest.mark.parametrize("split", [Split(wp=2, ep=2, grouped=True), Split(tp=2, ep=4, grouped=True), Split(tp=2)])
def test_other_square_weights_come_back(tmp_path: Path, split: Split) -> None:
    state = save(tmp_path / "old", "MIXTRALMOE", split, intermediate_size=32)
    assert_same(import_and_read(tmp_path / "old", tmp_path / "new")[0], state)


# -- the config --------------------------------------------------------------------------------------------------------


def test_gshard_is_imported_with_its_capacity(tmp_path: Path) -> None:
    kwargs = {"capacity_factor": 1.5, "min_capacity": 4, "drop_tokens": True, "noisy_gate_policy": "Jitter"}
    model = model_of("INTERNLM_MoE", section_of("INTERNLM_MoE"))
    section = section_of("INTERNLM_MoE", moe_layer_kwargs=kwargs)
    del section["moe_type"]  # InternEvo's default
    state = write(tmp_path / "old", model, Checkpoint("INTERNLM_MoE", section), Split(tp=2))
    imported = import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))
    selection = selection_of(imported.config.model)
    assert selection == Selection(Capacity(1.5, 1.0, 4, "choice", True), balances_first=True)
    assert selection.noise == RouterNoise(0.01)
    reader = TensorReader(imported.path)
    assert_same({name: reader.read(name) for name in reader.names()}, state)


def test_keys_of_the_first_versions_are_read(tmp_path: Path) -> None:
    section = section_of("INTERNLM_MoE", moe_use_residual=True, top_k=1)
    del section["num_shared_experts"], section["moe_type"]
    checkpoint = Checkpoint("INTERNLM_MoE", section, config={"moe": {"capacity_factor": 1.5, "use_rts": True}})
    model = model_of("INTERNLM_MoE", section_of("INTERNLM_MoE"))
    state = write(tmp_path / "old", model, checkpoint, Split(tp=2, older_names=True))
    imported = import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))
    reader = TensorReader(imported.path)
    assert_same({name: reader.read(name) for name in reader.names()}, state)
    assert any("use_fused_gating = False" in notice for notice in imported.notices)
    assert selection_of(imported.config.model).capacity == Capacity(1.5, 1.0, 4, "random")


def test_the_optimizer_is_left_out_with_a_notice(tmp_path: Path) -> None:
    save(tmp_path / "old", "QWEN3MOE", Split())
    torch.save({}, tmp_path / "old" / "optimizer_ep0_tp0_pp0_zo0.pt")
    _, notices = import_and_read(tmp_path / "old", tmp_path / "new")
    assert any("optimizer state of mixtures of experts is not imported" in notice for notice in notices)


# -- files that do not fit ---------------------------------------------------------------------------------------------


def refused(folder: Path, new: Path) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        import_internevo(folder, storage_path(new))
    assert not new.exists() or not [path for path in new.iterdir() if path.name.isdigit()], "something was written"
    return str(caught.value)


@pytest.mark.parametrize("grouped", [False, True])
def test_missing_surplus_and_double_files_are_named(tmp_path: Path, grouped: bool) -> None:
    folder = tmp_path / "old"
    save(folder, "MIXTRALMOE", Split(tp=2, ep=2, grouped=grouped))
    path = folder / "model_moe_layer2_expert1_tp1.pt"
    content = path.read_bytes()
    path.unlink()
    assert "missing: model_moe_layer2_expert1_tp1.pt" in refused(folder, tmp_path / "new")
    path.write_bytes(content)
    for surplus in ("model_moe_layer4_expert0_tp0.pt", "model_moe_layer7_expert1_tp1.pt"):
        (folder / surplus).write_bytes(content)
        assert f"in {2 if grouped else 4} x 2 file(s): {surplus}" in refused(folder, tmp_path / "new")
        (folder / surplus).unlink()
    (folder / "model_moe_layer2_expert01_tp1.pt").write_bytes(content)
    message = refused(folder, tmp_path / "new")
    assert "twice: model_moe_layer2_expert01_tp1.pt and model_moe_layer2_expert1_tp1.pt" in message
    (folder / "model_moe_layer2_expert01_tp1.pt").unlink()
    (folder / "model_moe_layer2_expert1_wp0.pt").write_bytes(content)
    assert "model_moe_layer2_expert1_wp0.pt' is of a wp rank" in refused(folder, tmp_path / "new")


def test_an_expert_that_no_layer_has_is_missing(tmp_path: Path) -> None:
    save(tmp_path / "old", "MIXTRALMOE", Split())
    for path in (tmp_path / "old").glob("model_moe_layer*_expert3_*.pt"):
        path.unlink()
    message = refused(tmp_path / "old", tmp_path / "new")
    assert "missing: model_moe_layer0_expert3_tp0.pt, model_moe_layer1_expert3_tp0.pt" in message
    for path in (tmp_path / "old").glob("model_moe_*.pt"):
        path.unlink()
    assert "has no expert files" in refused(tmp_path / "old", tmp_path / "new")


def test_a_renamed_file_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    save(folder, "MIXTRALMOE", Split(pp=2))
    path, other = folder / "model_moe_layer1_expert2_tp0.pt", folder / "model_moe_layer1_expert3_tp0.pt"
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    assert f"'{path}' contains expert 3" in refused(folder, tmp_path / "new")
    path.write_bytes((folder / "model_moe_layer0_expert2_tp0.pt").read_bytes())
    assert f"'{path}' contains 'layers.0." in refused(folder, tmp_path / "new")
    path.write_bytes(content)
    import_internevo(folder, storage_path(tmp_path / "new"))


def test_layers_that_internevo_wrote_over_each_other_are_named(tmp_path: Path) -> None:
    """Stages of 2, 3 and 3 layers: the third layer of the second stage and the first of the third are both number 4."""
    save(tmp_path / "old", "MIXTRALMOE", Split(pp=3), num_layers=8)
    message = refused(tmp_path / "old", tmp_path / "new")
    assert "experts of layers 4 and 5 under the same names (model_moe_layer4_*.pt)" in message


def test_stages_of_unequal_size_come_back_where_no_file_was_lost(tmp_path: Path) -> None:
    state = save(tmp_path / "old", "MIXTRALMOE", Split(pp=3, tp=2), num_layers=7)
    assert_same(import_and_read(tmp_path / "old", tmp_path / "new")[0], state)


def test_shapes_dtypes_and_values_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    save(folder, "MIXTRALMOE", Split(tp=2))
    path = folder / "model_moe_layer3_expert1_tp1.pt"
    state = torch.load(path)
    name = "model.layers.3.feed_forward.moe_layer.experts.wrapped_experts.1.w2.weight"
    torch.save({**state, name: state[name][:, :-1]}, path)
    message = refused(folder, tmp_path / "new")
    assert "'layers.3.feed_forward.experts.1.w2' must have shape [32, 48]" in message and path.name in message
    torch.save({key: tensor.float() for key, tensor in state.items()}, path)
    assert "different dtypes" in refused(folder, tmp_path / "new")
    torch.save({key: tensor for key, tensor in state.items() if key != name}, path)
    assert f"'{path}' has no w2.weight" in refused(folder, tmp_path / "new")
    torch.save({**state, name: torch.full_like(state[name], float("nan"))}, path)
    assert "'layers.3.feed_forward.experts.w2[1]' has 768 of 1,536 values" in refused(folder, tmp_path / "new")
    torch.save({**state, "model.layers.3.feed_forward.extra": state[name]}, path)
    assert "'layers.3.feed_forward.extra', which is not a weight of an expert" in refused(folder, tmp_path / "new")


def test_a_config_of_a_dense_model_is_named(tmp_path: Path) -> None:
    model = model_of("MIXTRALMOE", section_of("MIXTRALMOE"))
    write(tmp_path / "old", model, Checkpoint("MIXTRALMOE", section_of("MIXTRALMOE", num_experts=1)), Split())
    message = refused(tmp_path / "old", tmp_path / "new")
    assert "('model_moe_layer0_expert0_tp0.pt'), but the config's model is no mixture of experts" in message


def test_megablocks_layers_are_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path / "old", "INTERNLM_MoE", Split(), moe_type="MegaBlock-D")
    assert "'MegaBlock-D': the weights of megablocks' layers" in refused(tmp_path / "old", tmp_path / "new")


def test_one_expert_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "old", "MIXTRALMOE", Split(tp=2, ep=2, grouped=True))
    read, shapes = InternEvoExperts.read, []

    def watch(self: InternEvoExperts, name: str, expert: int) -> torch.Tensor:
        tensor = read(self, name, expert)
        shapes.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(InternEvoExperts, "read", watch)
    load, mapped = torch.load, []

    def watch_load(*args: Any, **kwargs: Any) -> Any:
        if "expert" in Path(args[0]).name:
            mapped.append(kwargs["mmap"] and kwargs["weights_only"])
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watch_load)
    import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))
    assert sorted(shapes) == sorted([(96, 32), (32, 48)] * 16)
    assert all(mapped)
