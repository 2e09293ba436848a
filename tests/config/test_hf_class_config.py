"""`model_type = "hf"`: the model section is filled from the config of a class, and nothing in it is ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.hf_runs import class_folder

from internlm.config.loader import LoadedConfig, load_config
from internlm.config.schema import Config
from internlm.utils.errors import ConfigError

pytest.importorskip("transformers")

OF_INTERNEVO = {
    "cfg": "transformers.models.llama.configuration_llama",
    "cfg_cls": "LlamaConfig",
    "cfg_extra_kwargs": {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "return_dict": False,
    },
    "mod": "transformers.models.llama.modeling_llama",
    "mod_cls": "LlamaForCausalLM",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return class_folder("qwen3", tmp_path / "class")


def load(tmp_path: Path, hf: dict[str, Any], model_type: str | None = "hf", **sections: dict[str, Any]) -> LoadedConfig:
    sections = {"model": {"dtype": "torch.float32"}, **sections}
    lines = [
        "data = dict(seq_len=8, micro_bsz=1, total_steps=1)",
        "ckpt = dict(enable_save_ckpt=False)",
        f"hf = {hf!r}",
    ]
    lines += [f"model_type = {model_type!r}"] if model_type else []
    lines += [f"{name} = {values!r}" for name, values in sections.items()]
    (tmp_path / "config.py").write_text("\n".join(lines))
    return load_config(tmp_path / "config.py")


def test_sizes_come_from_the_class(tmp_path: Path, folder: Path) -> None:
    model = load(tmp_path, {"folder": str(folder)}).config.model
    assert (model.vocab_size, model.hidden_size, model.num_layers) == (96, 32, 4)
    assert (model.num_attention_heads, model.num_kv_attention_heads, model.head_dim) == (4, 2, 8)


@pytest.mark.parametrize("model_type", ["hf", None])
def test_keys_of_internevo(tmp_path: Path, model_type: str | None) -> None:
    injected = {"dtype": "torch.float32", "inject_info": {"inject": True, "modules": ["embed", "linear", "norm"]}}
    loaded = load(tmp_path, OF_INTERNEVO, model_type, model=injected)
    assert loaded.config.model_type == "hf" and loaded.config.model.num_layers == 2
    assert any("inject_info.inject" in notice and "no effect" in notice for notice in loaded.notices)


def test_a_saved_config_needs_no_folder(tmp_path: Path, folder: Path) -> None:
    config = load(tmp_path, {"folder": str(folder)}).config
    (folder / "config.json").unlink()
    assert Config.model_validate(json.loads(config.model_dump_json())).model == config.model


def test_home_folders_are_expanded(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load(tmp_path, {"folder": "~/class"}).config
    assert config.hf.folder == str(folder) and config.model.num_layers == 4


def test_changes_of_the_config_of_a_folder(tmp_path: Path, folder: Path) -> None:
    hf = {"folder": str(folder), "cfg_extra_kwargs": {"max_position_embeddings": 64}}
    assert load(tmp_path, hf).config.model.max_position_embeddings == 64


MISTAKES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {}, "name the class either by hf.folder"),
    ({"folder": "{tmp}/nothing"}, {}, "there is no .*nothing/config.json"),
    ({"folder": "{folder}"}, {"model": {"num_layers": 3}}, "the config of the class says 4 .num_hidden_layers."),
    ({"folder": "{folder}"}, {"model": {"rope_base": 1e6}}, "model.rope_base = .* has no effect"),
    ({"folder": "{folder}", "cfg_extra_kwargs": {"layers": 2}}, {}, "a Qwen3Config has no layers"),
    ({"folder": "{folder}", "cfg_extra_kwargs": {"num_hidden_layers": 2}}, {}, "a Qwen3Config refuses them: .*layer"),
    ({**OF_INTERNEVO, "cfg": "huggingface_models.internlm2"}, {}, "hf.cfg = .* cannot be imported"),
    ({**OF_INTERNEVO, "mod_cls": "Lama"}, {}, "hf.mod_cls = 'Lama': there is no such class"),
    ({**OF_INTERNEVO, "mod_cls": "LlamaRMSNorm"}, {}, "'LlamaRMSNorm' in .* is no model of transformers"),
    ({"cfg": OF_INTERNEVO["cfg"]}, {}, "hf.cfg_cls, hf.mod, hf.mod_cls must name"),
    ({"folder": "{folder}", "cfg_extra_kwargs": [1]}, {}, "cfg_extra_kwargs = .1.: it must be a dict"),
    ({"folder": "{folder}"}, {"parallel": {"tensor": {"size": 2, "mode": "msp"}}}, "use 'isp' or 'mtp'"),
    ({"folder": "{folder}"}, {"float8": {"enable_float8_linear": True}}, "float8 is not supported in Hugging Face"),
]


@pytest.mark.parametrize(("hf", "sections", "message"), MISTAKES)
def test_mistakes_are_named(
    hf: dict[str, Any], sections: dict[str, Any], message: str, tmp_path: Path, folder: Path
) -> None:
    if "folder" in hf:
        hf = {**hf, "folder": hf["folder"].format(tmp=tmp_path, folder=folder)}
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, hf, **sections)


def test_a_class_for_another_model_type(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"hf\.folder names a class of transformers, but model_type = 'LLAMA2'"):
        load(
            tmp_path,
            {"folder": str(folder)},
            "LLAMA2",
            model={"vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4},
        )


def test_code_of_a_folder_needs_trust(tmp_path: Path, folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "auto_map": {"AutoModelForCausalLM": "code.Mine"}}))
    with pytest.raises(ConfigError, match=r"set hf\.trust_remote_code = True"):
        load(tmp_path, {"folder": str(folder)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is no JSON: "),
        ("[1]", "config.json is no JSON object"),
        ('{"model_type": "qwen3", "hidden_size": "large"}', "(?s)cannot read .*config.json: .*hidden_size"),
        (
            '{"model_type": "llama", "hidden_size": 32, "num_attention_heads": 3}',
            "(?s)cannot read .*multiple of .*heads",
        ),
        ('{"model_type": "qwen3", "num_hidden_layers": 0}', "num_hidden_layers = 0, where at least 1 is needed"),
    ],
)
def test_a_broken_config_is_named(text: str, message: str, tmp_path: Path, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, {"folder": str(folder)})


@pytest.mark.parametrize("code", ["class Mine(:", "import no_such_package", "raise RuntimeError('broken')"])
def test_broken_code_of_a_folder_is_named(
    code: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = folder / "config.json"
    references = {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.MineForCausalLM"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "mine", "auto_map": references}))
    (folder / "code.py").write_text(code)
    with pytest.raises(ConfigError, match=r"(?s)cannot read .*(SyntaxError|no_such_package|broken)"):
        load(tmp_path, {"folder": str(folder), "trust_remote_code": True})


def test_quantized_weights_are_refused(tmp_path: Path, folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ConfigError, match=r"quantization_config \(quant_method = 'fp8'\)"):
        load(tmp_path, {"folder": str(folder)})
    unquantized = {"folder": str(folder), "cfg_extra_kwargs": {"quantization_config": None}}
    described = load(tmp_path, unquantized).config.model.hf_class
    assert described is not None and "quantization_config" not in described["config"]


def test_dequantized_weights_are_exported_as_such(tmp_path: Path, folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "quantization_config": {"quant_method": "mxfp4"}}))
    described = load(tmp_path, {"folder": str(folder)}).config.model.hf_class
    assert described is not None and "quantization_config" not in described["config"]


def test_longer_samples_than_the_positions_of_the_class(tmp_path: Path, folder: Path) -> None:
    data = {"seq_len": 256, "micro_bsz": 1, "total_steps": 1}
    with pytest.raises(ConfigError, match=r"hf\.cfg_extra_kwargs = dict\(max_position_embeddings=256\)"):
        load(tmp_path, {"folder": str(folder)}, data=data)
    longer = {"folder": str(folder), "cfg_extra_kwargs": {"max_position_embeddings": 256}}
    assert load(tmp_path, longer, data=data).config.model.max_position_embeddings == 256


def test_other_kinds_of_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no num_attention_heads"):
        load(tmp_path, {"folder": str(class_folder("mamba", tmp_path / "mamba"))})
