"""Paths in a config: `~` is expanded in every key that is one, and `$` is said to be part of the name."""

import re

import pytest

from internlm.config.loader import load_config
from internlm.config.schema import CkptConfig, Config
from internlm.config.schema.base import is_path, walk_schema
from internlm.utils.errors import ConfigError

NO_PATHS = {
    "data.shm_path",  # of a key without effect
    "monitor.metrics_file",  # yes or no
}
MINIMAL = """
model = dict(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=8, dtype="torch.float32")
ckpt = dict(enable_save_ckpt=False)
data = dict(seq_len=8, micro_bsz=1, total_steps=1)
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "config.py").write_text(MINIMAL)
    return lambda *overrides: load_config(tmp_path / "config.py", overrides)


def value_of(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


def test_every_key_that_names_a_path_is_one():
    ends = r"(folder|_path|_file|\.path|chat_template|replay\.(read|write)|mm_vision_tower)$"
    named = {path for path, field in walk_schema(Config) if re.search(ends, path) and "str" in str(field.annotation)}
    paths = {path for path, field in walk_schema(Config) if is_path(field)}
    assert named - NO_PATHS == paths
    assert len(paths) > 10


def test_home_folders_are_expanded_in_every_path(load, tmp_path):
    paths = [path for path, field in walk_schema(Config) if is_path(field) and not path.startswith("ckpt.load")]
    # Which is for data in an object store.
    paths.remove("data.cache_folder")
    remote = load("data.train_folder=s3://b/x", "data.cache_folder=~/c").config.data
    assert (remote.train_folder, remote.cache_folder) == ("s3://b/x", f"{tmp_path}/home/c")
    # Which needs a class; see tests/config/test_hf_class_config.py.
    paths.remove("hf.folder")
    # Which is for rows.
    paths.remove("data.conversations.chat_template")
    rows = ("data.type=streaming", "data.train_folder=a", "data.tokenizer_path=b")
    conversations = load(*rows, "data.conversations={'chat_template': '~/t'}").config.data.conversations
    assert conversations.chat_template == f"{tmp_path}/home/t"
    # Which are for experts, and of which there is one.
    experts = ("model_type=MIXTRALMOE", "model.num_experts=2", "model.moe_type=Dropless")
    for name in ("read", "write"):
        paths.remove(f"moe.replay.{name}")
        replay = load(*experts, f"moe.replay.{name}=~/r").config.moe.replay
        assert getattr(replay, name) == f"{tmp_path}/home/r"
    # Which is for models that read pictures.
    paths.remove("model.vit_cfg.mm_vision_tower")
    llava = ("model_type=LLAVA", "model.image_token_id=3", "model.vision_proj_cfg={}")
    tower = load(*llava, "model.vit_cfg={'mm_vision_tower': '~/v'}").config.model.vit_cfg
    assert tower.mm_vision_tower == f"{tmp_path}/home/v"
    values = {path: f"~/{path}" for path in paths}
    # Another name of a key must not contradict it.
    values["data.dataset_folder"] = values["data.train_folder"]
    loaded = load(*(f"{path}={value}" for path, value in values.items()), "ckpt.load_ckpt_info={'path': 'local:~/w'}")
    for path in paths:
        assert value_of(loaded.config, path) == values[path].replace("~", f"{tmp_path}/home")
    assert loaded.config.ckpt.load_ckpt_info.path == f"local:{tmp_path}/home/w"
    assert CkptConfig(save_ckpt_folder="~/a").save_ckpt_folder == f"{tmp_path}/home/a"


def test_environment_variables_that_fill_a_path_are_expanded(load, tmp_path, monkeypatch):
    monkeypatch.setenv("tensorboard_folder", "~/tb")
    assert load().config.tensorboard_folder == f"{tmp_path}/home/tb"


def test_a_home_that_is_not_there_names_the_key(load):
    with pytest.raises(ConfigError, match=r"data\.train_folder = '~no_such_user/x': .*there is no user 'no_such_user'"):
        load("data.train_folder=~no_such_user/x")


def test_a_dollar_sign_is_said_to_be_part_of_the_name(load):
    notices = load("data.tokenizer_path=$DATA/tok").notices
    assert [n for n in notices if "$" in n] == [
        "data.tokenizer_path = '$DATA/tok': '$' is part of the name; for a variable write os.environ[...] in the config"
    ]
