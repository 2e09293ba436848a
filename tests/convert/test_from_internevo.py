"""What InternEvo saved comes out as the model that it was, bit for bit, whatever its layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.internevo_format import Checkpoint, Split, write
from helpers.internevo_models import FAMILIES, model_of, section_of
from helpers.model import tiny_model

from internlm.checkpoint.internevo import is_internevo
from internlm.checkpoint.load_model import load_model_for_inference
from internlm.checkpoint.tensor_files import TensorReader
from internlm.cli import main
from internlm.convert.from_internevo import Imported, import_internevo
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.storage import storage_path

SPLITS: dict[str, Split] = {
    "one file": Split(),
    "two tensor ranks": Split(tp=2),
    "four tensor ranks, vocabulary split": Split(tp=4, embed_dim=0),
    "three stages": Split(pp=3),
    "two tensor ranks, two stages, older names": Split(tp=2, pp=2, older_names=True),
    "two chunks in one numbering": Split(tp=2, pp=2, chunks=2),
    "two chunks in lists": Split(pp=2, chunks=2, chunk_lists=True),
    "V": Split(pp=2, chunks=2, v_shape=True),
    "four weight ranks": Split(wp=4),
    "two weight ranks, two stages": Split(wp=2, pp=2),
    "head over fewer ranks": Split(wp=4, head_ranks=2),
    "no prefix, biases on every rank": Split(tp=2, model_prefix=False, row_bias_everywhere=True),
}


def save(folder: Path, model_type: str, split: Split, model: Any = None, **changes: Any) -> dict[str, torch.Tensor]:
    section = section_of(model_type, **changes)
    if split.chunks > 1:
        section["num_chunks"] = split.chunks
    written = {name: value for name, value in section.items() if name != "tie_word_embeddings"}
    return write(folder, model or model_of(model_type, section), Checkpoint(model_type, written), split)


def read_back(imported: Imported) -> dict[str, torch.Tensor]:
    reader = TensorReader(imported.path)
    return {name: reader.read(name) for name in reader.names()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_and_split_comes_back(tmp_path: Path, model_type: str, split: Split) -> None:
    state = save(tmp_path / "old", model_type, split)
    imported = import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))
    assert imported.path.name == "40"
    assert_same(read_back(imported), state)


def test_the_imported_checkpoint_is_one_that_runs(tmp_path: Path) -> None:
    section = section_of("LLAMA2", dtype=torch.float32)
    model = model_of("LLAMA2", section)
    write(tmp_path / "old", model, Checkpoint("LLAMA2", section), Split(tp=2, pp=2))
    import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))
    loaded, config = load_model_for_inference(tmp_path / "new")
    assert (config.model_type, config.JOB_NAME, config.data.seq_len) == ("LLAMA2", "old_run", 64)
    ids, positions = torch.arange(12)[None], torch.arange(12)[None]
    torch.testing.assert_close(loaded(ids, positions), model(ids, positions), rtol=0, atol=0)  # type: ignore[operator]


@pytest.mark.parametrize(
    "split",
    [
        Split(older_feed_forward=True),
        Split(tp=2, older_feed_forward=True, older_names=True),
        Split(wp=2, older_feed_forward=True),
    ],
)
def test_the_swapped_feed_forward_of_the_first_versions_is_told_from_shapes(tmp_path: Path, split: Split) -> None:
    state = save(tmp_path / "old", "INTERNLM", split)
    assert_same(read_back(import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))), state)


@pytest.mark.parametrize("split", [Split(tp=2), Split(wp=2, fused_gate_up=True), Split(wp=4, fused_gate_up=True)])
def test_a_fused_gate_comes_back(tmp_path: Path, split: Split) -> None:
    state = save(tmp_path / "old", "LLAMA2", split, mlp_layer_fusion=True)
    assert "layers.0.feed_forward.w13.weight" in state
    assert_same(read_back(import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))), state)


@pytest.mark.parametrize("fused", [False, True], ids=["separate here", "fused here"])
@pytest.mark.parametrize("split", [Split(tp=2, fused_qkv=True), Split(wp=4, fused_qkv=True)])
def test_projections_fused_by_group_come_back(tmp_path: Path, split: Split, fused: bool) -> None:
    changes = {"enable_qkv_fusion": True} if fused else {}
    state = save(tmp_path / "old", "LLAMA2", split, **changes)
    assert ("layers.0.attention.wqkv.weight" in state) == fused
    assert_same(read_back(import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))), state)


def test_baichuan_with_separate_projections_comes_back(tmp_path: Path) -> None:
    state = save(tmp_path / "old", "BAICHUAN2", Split(tp=2, separate_qkv=True))
    assert_same(read_back(import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))), state)


@pytest.mark.parametrize("chunk_lists", [False, True])
def test_a_v_of_four_stages_comes_back(tmp_path: Path, chunk_lists: bool) -> None:
    split = Split(pp=4, chunks=2, v_shape=True, chunk_lists=chunk_lists)
    state = save(tmp_path / "old", "LLAMA2", split, num_layers=8)
    assert_same(read_back(import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))), state)


def test_interleaved_chunks_of_unequal_stages_come_back(tmp_path: Path) -> None:
    state = save(tmp_path / "old", "LLAMA2", Split(pp=3, chunks=2), num_layers=8)
    assert_same(read_back(import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))), state)


def test_a_reward_model_and_norms_with_biases_come_back(tmp_path: Path) -> None:
    state = save(tmp_path / "old", "INTERNLM2", Split(tp=2, pp=2), is_reward=True, norm_type="layernorm")
    assert state["output.weight"].shape == (1, 32)
    assert_same(read_back(import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))), state)


def test_norms_in_another_format_are_kept(tmp_path: Path) -> None:
    section = section_of("LLAMA2")
    model = tiny_model("LLAMA2", norm_dtype=torch.float32, **section)
    checkpoint = Checkpoint("LLAMA2", section, config={"use_fp32_norm": True})
    state = write(tmp_path / "old", model, checkpoint, Split(tp=2))
    imported = import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))
    assert_same(read_back(imported), state)
    assert not any("keep the dtype of the files" in notice for notice in imported.notices)


# -- what the config is made of ----------------------------------------------------------------------------------------


def test_biases_and_the_head_are_told_by_the_files(tmp_path: Path) -> None:
    """InternEvo's Baichuan2 has a bias on q, k, v unless no_bias; its Gemma always has a head of its own."""
    section = section_of("BAICHUAN2", qkv_bias=True)
    model = model_of("BAICHUAN2", section)
    state = write(tmp_path / "b", model, Checkpoint("BAICHUAN2", section_of("BAICHUAN2", no_bias=False)), Split(tp=2))
    imported = import_internevo(tmp_path / "b", storage_path(tmp_path / "new_b"))
    assert_same(read_back(imported), state)
    assert any("o_bias = False" in notice for notice in imported.notices)

    state = save(tmp_path / "g", "GEMMA", Split())
    imported = import_internevo(tmp_path / "g", storage_path(tmp_path / "new_g"))
    assert "output.weight" in read_back(imported)
    assert any("tie_word_embeddings = False" in notice for notice in imported.notices)


def test_interleaved_rotary_pairs_stay_as_the_model_section_says(tmp_path: Path) -> None:
    section = section_of("LLAMA2", qk_interleaved=True, dtype=torch.float32)
    model = model_of("LLAMA2", section)
    write(tmp_path / "old", model, Checkpoint("LLAMA2", section), Split(tp=2))
    import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))
    loaded, config = load_model_for_inference(tmp_path / "new")
    assert config.model.qk_interleaved
    ids = torch.arange(12)[None]
    torch.testing.assert_close(loaded(ids, ids), model(ids, ids), rtol=0, atol=0)


def test_what_internevo_chooses_otherwise_is_said(tmp_path: Path) -> None:
    section = section_of("BAICHUAN2", dtype=torch.float16)
    model = model_of("BAICHUAN2", section)
    short = {name: v for name, v in section.items() if name not in ("dtype", "norm_head", "qk_interleaved")}
    write(tmp_path / "old", model, Checkpoint("BAICHUAN2", short), Split())
    imported = import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))
    _, config = load_model_for_inference(tmp_path / "new")
    assert (config.model.dtype, config.model.norm_head) == ("torch.float16", False)
    for key in ("model.dtype", "model.norm_head", "model.qk_interleaved"):
        assert any(notice.startswith(key) for notice in imported.notices), key


@pytest.mark.parametrize("with_section", [True, False])
def test_either_of_the_two_config_files_is_enough(tmp_path: Path, with_section: bool) -> None:
    section = section_of("INTERNLM2")
    checkpoint = Checkpoint("INTERNLM2", section, with_config=not with_section, with_section=with_section)
    state = write(tmp_path / "old", model_of("INTERNLM2", section), checkpoint, Split(tp=2))
    model_type = "INTERNLM2" if with_section else None
    assert_same(
        read_back(import_internevo(tmp_path / "old", storage_path(tmp_path / "new"), model_type=model_type)), state
    )


def test_a_given_config_wins_over_those_of_the_folder(tmp_path: Path) -> None:
    section = section_of("INTERNLM2")
    checkpoint = Checkpoint("INTERNLM2", {**section, "hidden_size": 64}, with_config=False)
    state = write(tmp_path / "old", model_of("INTERNLM2", section), checkpoint, Split())
    config = tmp_path / "mine.py"
    config.write_text(f"model_type = 'INTERNLM2_PUBLIC'\nmodel = { ({**section, 'dtype': 'torch.bfloat16'})!r}\n")
    imported = import_internevo(tmp_path / "old", storage_path(tmp_path / "new"), config_file=config)
    assert_same(read_back(imported), state)
    assert (imported.path / "config_file.py").read_text() == config.read_text()


# -- the command, and mistakes -----------------------------------------------------------------------------------------


def test_the_command_shows_counters_and_what_was_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "old", "INTERNLM2", Split(tp=2, pp=2))
    assert main(["convert", "from-internevo", "--ckpt", str(tmp_path / "old"), "--out", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "2 tensor parallel rank(s), 2 pipeline stage(s)" in out
    assert "step_count: 40" in out and "num_consumed_tokens: 163,840" in out
    assert "notice: there are no optimizer files: moments start at zero, masters are copies of the weights" in out
    assert out.splitlines()[-1] == str(tmp_path / "new" / "40")


def refused(folder: Path, new: Path) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        import_internevo(folder, storage_path(new))
    assert not new.exists() or not [path for path in new.iterdir() if path.name.isdigit()], "something was written"
    return str(caught.value)


@pytest.mark.parametrize("out", ["runs", "new"], ids=["the folder that is read", "an earlier import"])
def test_nothing_is_replaced(tmp_path: Path, out: str) -> None:
    save(tmp_path / "runs" / "40", "LLAMA2", Split())
    import_internevo(tmp_path / "runs" / "40", storage_path(tmp_path / "new"))
    before = {path: path.read_bytes() for path in (tmp_path / out / "40").iterdir()}
    with pytest.raises(CheckpointError, match=r"/40' already exists and would be replaced; give another --out"):
        import_internevo(tmp_path / "runs" / "40", storage_path(tmp_path / out))
    assert {path: path.read_bytes() for path in (tmp_path / out / "40").iterdir()} == before


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    save(tmp_path / "old", "LLAMA2", Split(tp=2, pp=2))
    (tmp_path / "old" / "model_tp0_pp1.pt").unlink()
    assert "missing: model_tp0_pp1.pt" in refused(tmp_path / "old", tmp_path / "new")


@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_a_cut_file_is_named(tmp_path: Path, keep: int) -> None:
    save(tmp_path / "old", "LLAMA2", Split(tp=2))
    path = tmp_path / "old" / "model_tp1_pp0.pt"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"'{path}' is damaged" in refused(tmp_path / "old", tmp_path / "new")


class Code:
    """Unpickling it calls a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/nowhere/else",)


def test_a_file_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    save(tmp_path / "old", "LLAMA2", Split())
    path = tmp_path / "old" / "model_tp0_pp0.pt"
    torch.save({**torch.load(path), "model.extra": Code()}, path)
    message = refused(tmp_path / "old", tmp_path / "new")
    assert str(path) in message and "code from a checkpoint is not run" in message and "mkdir" in message


def test_sizes_that_do_not_fit_are_named_with_their_files(tmp_path: Path) -> None:
    section = section_of("LLAMA2")
    checkpoint = Checkpoint("LLAMA2", {**section, "intermediate_size": 64})
    write(tmp_path / "old", model_of("LLAMA2", section), checkpoint, Split(tp=2))
    message = refused(tmp_path / "old", tmp_path / "new")
    assert "'layers.3.feed_forward.w2.weight' must have shape [32, 64]" in message
    assert "model_tp0_pp0.pt [32, 24], model_tp1_pp0.pt [32, 24]" in message


def test_weights_that_are_missing_or_left_over_are_named(tmp_path: Path) -> None:
    save(tmp_path / "old", "LLAMA2", Split(tp=2))
    for rank in range(2):
        path = tmp_path / "old" / f"model_tp{rank}_pp0.pt"
        state = torch.load(path)
        state["model.extra_heads.0.weight"] = torch.zeros(2)
        torch.save(state, path)
    assert "'extra_heads.0.weight' is in the files" in refused(tmp_path / "old", tmp_path / "new")
    for rank in range(2):
        path = tmp_path / "old" / f"model_tp{rank}_pp0.pt"
        state = torch.load(path)
        del state["model.layers.2.ffn_norm.weight"]
        torch.save(state, path)
    assert "'layers.2.ffn_norm.weight' is missing" in refused(tmp_path / "old", tmp_path / "new")
    state["model.layers.2.ffn_norm.weight"] = torch.zeros(32)
    torch.save(state, path)
    message = refused(tmp_path / "old", tmp_path / "new")
    assert "ffn_norm.weight' is missing in model_tp0_pp0.pt; other ranks have it" in message


@pytest.mark.parametrize("name", ["layers.1.attention_norm.weight", "layers.1.attention.wo.bias"])
def test_replicas_that_differ_are_named(tmp_path: Path, name: str) -> None:
    state = save(tmp_path / "old", "LLAMA2", Split(tp=2, row_bias_everywhere=True), o_bias=True)
    path = tmp_path / "old" / "model_tp1_pp0.pt"
    changed = torch.load(path)
    changed[f"model.{name}"] = state[name].clone()
    changed[f"model.{name}"][0] += 1
    torch.save(changed, path)
    message = refused(tmp_path / "old", tmp_path / "new")
    assert f"'{name}' should be equal on all ranks, but model_tp0_pp0.pt and model_tp1_pp0.pt differ" in message


def test_parts_of_a_head_that_ranks_share_are_compared(tmp_path: Path) -> None:
    save(tmp_path / "old", "LLAMA2", Split(wp=4, head_ranks=2))
    path = tmp_path / "old" / "model_wp3_pp0.pt"
    changed = torch.load(path)
    changed["model.output.weight"][0] += 1
    torch.save(changed, path)
    assert "model_wp1_pp0.pt and model_wp3_pp0.pt differ" in refused(tmp_path / "old", tmp_path / "new")


def test_replicas_with_nan_are_equal_and_not_imported(tmp_path: Path) -> None:
    model = model_of("LLAMA2", section_of("LLAMA2"))
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    save(tmp_path / "old", "LLAMA2", Split(tp=2), model)
    message = refused(tmp_path / "old", tmp_path / "new")
    assert "'norm.weight' has 1 of 32 values that are not finite" in message


def test_frequencies_that_contradict_the_config_are_named(tmp_path: Path) -> None:
    save(tmp_path / "old", "LLAMA2", Split())
    path = tmp_path / "old" / "model_tp0_pp0.pt"
    state = torch.load(path)
    width = section_of("LLAMA2")["hidden_size"] // section_of("LLAMA2")["num_attention_heads"]
    name = "model.layers.0.attention.rotary_emb.inv_freq"
    torch.save({**state, name: 10000.0 ** -(torch.arange(0, width, 2) / width)}, path)
    import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))
    torch.save({**state, name: 1e6 ** -(torch.arange(0, width, 2) / width)}, path)
    message = refused(tmp_path / "old", tmp_path / "newer")
    assert "a rotary base of about 1e+06, the config says 10000" in message


@pytest.mark.parametrize(
    ("name", "reason"),
    [("model_tp0_pp0_dp1.pt", "FSDP"), ("model_moe_layer0_expert3_tp0.pt", "no mixture of experts")],
)
def test_kinds_that_cannot_be_imported_are_refused_by_name(tmp_path: Path, name: str, reason: str) -> None:
    save(tmp_path / "old", "LLAMA2", Split())
    torch.save({}, tmp_path / "old" / name)
    message = refused(tmp_path / "old", tmp_path / "new")
    assert name in message and reason in message


def test_a_head_of_which_parts_were_never_saved_is_refused(tmp_path: Path) -> None:
    """isp with more sequence ranks than weight ranks, in versions that split the head over the sequence's ranks."""
    save(tmp_path / "old", "LLAMA2", Split(wp=2, head_ranks=4))
    assert "the others are not in this checkpoint" in refused(tmp_path / "old", tmp_path / "new")


def test_fused_rows_under_other_names_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "old", "INTERNLM2", Split(tp=2, separate_qkv=True))
    assert "enable_qkv_fusion = False" in refused(tmp_path / "old", tmp_path / "new")
    state = save(tmp_path / "plain", "INTERNLM2", Split(tp=2, separate_qkv=True), enable_qkv_fusion=False)
    assert_same(read_back(import_internevo(tmp_path / "plain", storage_path(tmp_path / "new"))), state)


def test_a_folder_of_checkpoints_is_told_from_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "save" / "20", "LLAMA2", Split())
    save(tmp_path / "save" / "100", "LLAMA2", Split())
    assert str(tmp_path / "save" / "100") in refused(tmp_path / "save", tmp_path / "new")
    assert "no InternEvo checkpoint" in refused(tmp_path / "nothing", tmp_path / "new")


def test_a_gemma_without_the_unit_offset_is_refused(tmp_path: Path) -> None:
    section = section_of("GEMMA")
    del section["add_unit_offset"]
    write(tmp_path / "old", model_of("GEMMA", section), Checkpoint("GEMMA", section), Split())
    assert "add_unit_offset" in refused(tmp_path / "old", tmp_path / "new")


def test_a_mistake_in_the_saved_config_text_names_its_file(tmp_path: Path) -> None:
    save(tmp_path / "old", "LLAMA2", Split())
    torch.save("from nowhere import it\n", tmp_path / "old" / "config_file.pt")
    message = refused(tmp_path / "old", tmp_path / "new")
    assert f"{tmp_path / 'old' / 'config_file.pt'}:1: ModuleNotFoundError" in message and "--config" in message


@pytest.mark.parametrize("given", ["old", "old/40"])
def test_loading_internevos_files_as_ours_names_the_command(tmp_path: Path, given: str) -> None:
    save(tmp_path / "old" / "40", "LLAMA2", Split())
    assert is_internevo(storage_path(tmp_path / "old" / "40")) and not is_internevo(storage_path(tmp_path / "old"))
    with pytest.raises(CheckpointError, match=r"internlm convert from-internevo --ckpt .*old/40"):
        load_model_for_inference(tmp_path / given)
    (tmp_path / "old" / "40" / "40.step").unlink()
    with pytest.raises(CheckpointError, match="internlm convert from-internevo"):
        load_model_for_inference(tmp_path / "old" / "40")


def test_no_more_than_a_weight_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are mapped: of a weight that the ranks hold in parts, one copy exists while it is written."""
    section = section_of("LLAMA2")
    write(tmp_path / "old", model_of("LLAMA2", section), Checkpoint("LLAMA2", section), Split(tp=2))
    calls: list[dict[str, Any]] = []
    load = torch.load

    def watch(*args: Any, **kwargs: Any) -> Any:
        calls.append({"file": Path(args[0]).name, **kwargs})
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watch)
    import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))
    weights = [call for call in calls if call["file"].startswith("model_tp")]
    assert len(weights) == 2 and all(call["mmap"] and call["weights_only"] for call in weights)
