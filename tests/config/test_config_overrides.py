"""`--set key.path=value`."""

import pytest

from internlm.config.loader import load_config
from internlm.config.overrides import parse_override
from internlm.config.schema import Config
from internlm.utils.errors import ConfigError

FILE = """\
data = dict(seq_len=16, micro_bsz=2, total_steps=10, min_length_dict={"en": 3})
model = dict(vocab_size=64, hidden_size=32, num_layers=2, num_attention_heads=4, dtype="torch.float32",
             moe_layer_kwargs=dict(n_group=1))
ckpt = dict(save_ckpt_folder="runs/x", checkpoint_every=5)
parallel = dict(tensor=dict(size=1, mode="isp"))
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "config.py").write_text(FILE)
    return tmp_path / "config.py"


@pytest.mark.parametrize(
    "text, value",
    [
        ("data.total_steps=20", 20),
        ("data.total_steps = 20", 20),
        ("adam.lr=3e-4", 3e-4),
        ("enable_tb=False", False),
        ("enable_tb=true", True),
        ("data.train_folder=None", None),
        ("data.train_folder=data/demo/train", "data/demo/train"),
        ("data.train_folder='data/demo'", "data/demo"),
        ("JOB_NAME=7", "7"),
        ("JOB_NAME=a=b", "a=b"),
        ("model.dtype=torch.float16", "torch.float16"),
        ("model.checkpoint=True", 1.0),
        ("ckpt.checkpoint_every=7", 7),
        ("data.skip_batches=2-5,7", "2-5,7"),
        ("data.skip_batches=7", "7"),
        ("data.rampup_batch_size=1 1 5", "1 1 5"),
        ("tensorboard.queue_max_length=9", 9),
        ("data.min_length_dict={'cn': 5}", {"cn": 5}),
        ("data.min_length_dict=dict(cn=5, en=6)", {"cn": 5, "en": 6}),
        ("JOB_NAME=null", "null"),
        ("JOB_NAME=dict", "dict"),
        ("data.min_length_dict.cn=5", {"en": 3, "cn": 5}),
        ("model.num_kv_attention_heads=2", 2),
    ],
)
def test_values_are_typed_by_the_schema(path, text, value):
    loaded = load_config(path, [text])
    key = text.split("=")[0].strip()
    found = loaded.config
    for name in (key if "min_length_dict" not in key else "data.min_length_dict").split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)
    assert str(loaded.origins.get(key, "--set")) == "--set"


def test_a_section_keeps_what_is_not_set(path):
    loaded = load_config(path, ["parallel.tensor=1", "parallel.zero1.size=1"])
    assert loaded.config.parallel.tensor.mode == "isp"
    assert loaded.config.parallel.zero1.size == 1
    assert loaded.notices == ["parallel.tensor = 1 is read as parallel.tensor = dict(size=1)"]


def test_a_section_may_be_written_as_in_a_config(path):
    loaded = load_config(path, ["ckpt.load_ckpt_info=dict(path='x', content=('model',))", "parallel=dict(zero1=1)"])
    assert loaded.config.ckpt.load_ckpt_info.path == "x" and loaded.config.parallel.zero1.size == 1
    assert loaded.config.parallel.tensor.mode == "isp"


def test_the_last_one_wins(path):
    assert load_config(path, ["seed=1", "seed=2"]).config.seed == 2


def test_older_spellings(path):
    loaded = load_config(path, ["hybrid_zero_optimizer.zero_overlap_communication=True"])
    assert loaded.config.hybrid_zero_optimizer.overlap_sync_grad is True


def test_nothing_to_load(path):
    path.write_text(FILE + "ckpt['load_ckpt_info'] = dict(path='x')\n")
    assert load_config(path).config.ckpt.load_ckpt_info.path == "x"
    assert load_config(path, ["ckpt.load_ckpt_info=None"]).config.ckpt.load_ckpt_info is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("data.total_step=5", "--set: data.total_step is not a known key. Did you mean 'total_steps'?"),
        ("dta.total_steps=5", "--set: dta is not a known key. Did you mean 'data'?"),
        ("data.total_steps=many", "--set: data.total_steps = 'many': it must be a valid integer"),
        ("data.seq_len.x=3", "--set: data.seq_len = {'x': 3}: it must be a valid integer"),
        ("parallel.context.size=True", "--set: parallel.context.size = True: it must be a valid integer"),
        ("ckpt.checkpoint_every=False", "--set: ckpt.checkpoint_every = False: it must be a valid integer"),
        ("adam.lr=-1", "--set: adam.lr = -1: it must be greater than or equal to 0"),
        ("model.drop_rate=0.5", "--set: model.drop_rate = 0.5: dropout is not yet supported; set it to 0.0"),
        ("data.total_steps", "--set data.total_steps: expected key.path=value"),
        ("data.train_folder=null", "--set data.train_folder=null: values are written as in Python: use --set data."),
        ("data.skip_batches=NULL", "--set data.skip_batches=NULL: values are written as in Python: use --set data."),
        ("data.total_steps=null", "--set: data.total_steps = 'null': it must be a valid integer"),
        ("x=null", "--set: x is not a known key."),
        ("parallel.tensor=dict(os.getcwd())", "--set: parallel.tensor = 'dict(os.getcwd())': it must be a dict"),
        ("=5", "--set =5: expected key.path=value"),
        ("data..x=5", "--set data..x=5: expected key.path=value"),
    ],
)
def test_mistakes(path, text, message):
    with pytest.raises(ConfigError) as error:
        load_config(path, [text])
    assert error.value.mistakes[0].startswith(message)
    assert len(error.value.mistakes) == 1


def test_a_value_of_another_option_wins_and_its_mistakes_name_that_option(path):
    options = {"--layout tensor=2": {"parallel.tensor.size": 1, "parallel.tensor.mode": "msp"}}
    loaded = load_config(path, ["parallel.tensor.size=8", "seed=3"], options=options)
    assert (loaded.config.parallel.tensor.size, loaded.config.seed) == (1, 3)
    assert str(loaded.origins["parallel.tensor.mode"]) == "--layout tensor=2"
    assert str(loaded.origins["seed"]) == "--set"
    with pytest.raises(ConfigError) as error:
        load_config(path, ["adam.lr=-1"], options={"--seed": {"seed": "many"}})
    assert [mistake.partition(" = ")[0] for mistake in error.value.mistakes] == ["--seed: seed", "--set: adam.lr"]


def test_a_malicious_value_is_only_text():
    assert parse_override("JOB_NAME=__import__('os').getcwd()", Config) == ("JOB_NAME", "__import__('os').getcwd()")
