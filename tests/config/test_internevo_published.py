"""InternEvo's published configs: most load and train as they are, others name the feature that is not there."""

import ast
import re

import pytest
from helpers.forked import run_forked
from helpers.internevo_configs import REFUSED, SUPPORTED, text

from internlm.cli import main
from internlm.config.loader import load_config
from internlm.utils.errors import ConfigError

# What a run of it would miss, for it names no more than a place for it.
MISSING = {
    "20B_internlm2": "/path/of/tokenized_data: no such folder",
    "demo_llava": "there is no folder 'openai/a-tower-that-nobody-has'",
    "70B_sft_llama2": "dolly_tokenizer_llama/train: no such folder",
}


def write(folder, keys):
    (folder / "theirs.py").write_text(text(keys))
    return folder / "theirs.py"


def test_heads_that_its_ranks_do_not_divide(tmp_path):
    """InternEvo's 20B_isp_sft splits 48 heads over 32 ranks, which whole heads do not allow, there as here."""
    ranks, keys = SUPPORTED["20B_isp_sft"]
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, keys), world_size=ranks)
    (mistake,) = error.value.mistakes
    assert "model.num_attention_heads = 48 is not divisible by parallel.tensor.size = 32" in mistake
    load_config(write(tmp_path, {**keys, "parallel.tensor.size": 16}), world_size=ranks)


@pytest.mark.parametrize("name", [name for name in SUPPORTED if name != "20B_isp_sft"])
def test_a_supported_one_loads_unchanged(name, tmp_path):
    ranks, keys = SUPPORTED[name]
    path = write(tmp_path, keys)
    config = load_config(path, world_size=ranks).config
    given = ast.literal_eval(re.search(r"^model = (.*)", path.read_text(), re.MULTILINE)[1])
    for key, value in given.items():
        loaded = getattr(config.model, key)
        if isinstance(value, dict):
            loaded = {name: getattr(loaded, name) for name in value}
        assert loaded == value or key == "num_chunks", key


@pytest.mark.parametrize("name", [name for name, (_, keys) in SUPPORTED.items() if "ckpt.load_ckpt_info" not in keys])
def test_a_supported_one_runs_dry(name, tmp_path):
    ranks, keys = SUPPORTED[name]
    out = run_forked(tmp_path, dry_run, str(write(tmp_path, keys)), ranks, 2 if name in MISSING else 0)
    if name in MISSING:
        assert MISSING[name] in out
    else:
        assert "the config is valid" in out and "notice: all differences from InternEvo are listed in doc/" in out
    assert "Traceback" not in out


def dry_run(path, ranks, code):
    assert main(["train", "--config", path, "--dry-run", "--world-size", str(ranks)]) == code


@pytest.mark.parametrize("name", REFUSED)
def test_another_one_is_refused_by_feature(name, tmp_path):
    ranks, keys, reasons = REFUSED[name]
    path = write(tmp_path, keys)
    with pytest.raises(ConfigError) as error:
        load_config(path, world_size=ranks)
    found = sorted(mistake.split(": ", 1)[1] for mistake in error.value.mistakes)
    assert len(found) == len(reasons), found
    for mistake, reason in zip(found, sorted(reasons), strict=True):
        assert mistake.startswith(f"{reason} is not yet supported")


@pytest.mark.parametrize("name", ["7B_sft", "usage.md"])
def test_a_quickstart_trains(name, tmp_path):
    """As it is, but for sizes that a test has time for and the weights that it does not bring along."""
    out = run_forked(tmp_path, train_small, str(write(tmp_path, SUPPORTED[name][1])))
    assert "done: 2 steps" in out


def train_small(path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "multiple_of": 16}
    small = {f"model.{key}": value for key, value in sizes.items()}
    small |= {"data.seq_len": 32, "data.total_steps": 2, "lr_scheduler.total_steps": 2, "data.num_worker": 0}
    small |= {"parallel.zero1.size": 1, "enable_tb": False, "ckpt.load_ckpt_info": None, "ckpt.load_ckpt_folder": None}
    overrides = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    assert main(["train", "--config", path, "--run-dir", "run", *overrides]) == 0
