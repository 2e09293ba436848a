"""What a path means to `generate`, `chat`, `serve` and `eval`: a checkpoint, a run, or a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands.test_chat_command import make_folder
from convert.test_multi_token_folder import folder_of
from helpers.hf_folders import NATIVE, native_model, save_native

from internlm.checkpoint.load_model import load_model_for_inference
from internlm.checkpoint.reading import read_config
from internlm.cli import main
from internlm.convert.from_hf import convert_from_hf
from internlm.monitor.run_file import StartedRun, write_run_file
from internlm.serve.answering_model import load_answering_model
from internlm.utils.errors import CheckpointError, ConfigError, DataError
from internlm.utils.storage import storage_path

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [*NATIVE, "with multi-token prediction"])
def test_a_hugging_face_folder_is_the_checkpoint_that_it_converts_to(name: str, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    if name in NATIVE:
        save_native(name, source, torch.bfloat16)
    else:
        folder_of(source, "deepseek-v3")
    expected, config = load_model_for_inference(convert_from_hf(storage_path(source), storage_path(tmp_path / "new")))
    model, found, place = load_answering_model(str(source), CPU)
    assert str(place) == str(source) and found.JOB_NAME == "hf" and not model.training
    assert found.model == config.model.model_copy(update={"num_nextn_predict_layers": 0})
    ours, theirs = dict(model.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys() and len(ours) > 5
    for key, weight in ours.items():
        assert weight.dtype == theirs[key].dtype and torch.equal(weight, theirs[key]), key


def test_its_tokenizer_and_template_answer_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An exported folder writes the text of the checkpoint."""
    folder = make_folder(tmp_path)
    assert main(["convert", "to-hf", "--ckpt", str(folder / "run"), "--out", str(tmp_path / "hf")]) == 0
    options = ["--prompt", "one", "--greedy", "--max-new-tokens", "7", "--device", "cpu"]
    capsys.readouterr()
    texts = []
    for path in (folder / "run", tmp_path / "hf"):
        assert main(["generate", "--ckpt", str(path), *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("one")


def test_a_run_answers_with_its_newest_checkpoint(tmp_path: Path) -> None:
    """`ckpt.save_ckpt_folder` of run.json says where it is."""
    save = make_folder(tmp_path) / "run"
    config = read_config(storage_path(save / "0"))
    ckpt = config.ckpt.model_copy(update={"save_ckpt_folder": str(save), "enable_save_ckpt": True})
    started = tmp_path / "started"
    started.mkdir()
    write_run_file(started, StartedRun(config.model_copy(update={"ckpt": ckpt}), 1))
    _, _, place = load_answering_model(str(started), CPU)
    assert str(place) == str(save / "0")

    # A folder of checkpoints in which the run also writes its numbers.
    shutil.copy(started / "run.json", save / "run.json")
    assert str(load_answering_model(str(save), CPU)[2]) == str(save / "0")

    without = ckpt.model_copy(update={"enable_save_ckpt": False})
    write_run_file(started, StartedRun(config.model_copy(update={"ckpt": without}), 1))
    with pytest.raises(ConfigError, match=r"started' saves no checkpoints \(ckpt.enable_save_ckpt"):
        load_answering_model(str(started), CPU)
    (started / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run.json' cannot be read"):
        load_answering_model(str(started), CPU)


def test_what_no_model_can_be_made_of_is_named(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises((CheckpointError, ConfigError), match="other"):
        load_answering_model(str(tmp_path / "other"), CPU)
    save_native("llama", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"'model.layers.2.input_layernorm.weight' is missing"):
        load_answering_model(str(tmp_path / "hf"), CPU)
    model = native_model("llama", torch.float32)
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(CheckpointError, match=r"nan': 'norm\.weight' has 1 of \d+ values that are not finite"):
        load_answering_model(str(tmp_path / "nan"), CPU)
    with pytest.raises(CheckpointError, match="the path does not exist"):
        load_answering_model(str(tmp_path / "nowhere"), CPU)
