"""Config files: what is a key, inheritance, lines, and mistakes reported together."""

import textwrap

import pytest

from internlm.config import read_base
from internlm.config.loader import check_config, load_config
from internlm.config.print_config import format_config
from internlm.config.schema import CkptConfig, Config, DataConfig, ModelConfig
from internlm.utils.errors import ConfigError

GOOD = """\
    data = dict(seq_len=16, micro_bsz=2, total_steps=10)
    model = dict(vocab_size=64, hidden_size=32, num_layers=2, num_attention_heads=4, dtype="torch.float32")
    ckpt = dict(enable_save_ckpt=False)
    """


@pytest.fixture
def write(tmp_path):
    def write(text, name="config.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write


def mistakes(path, *overrides, world_size=1):
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides, world_size)
    return error.value.mistakes


def test_values_origins_and_notices(write):
    path = write(GOOD)
    loaded = load_config(path)
    assert loaded.config.data.packed_length == 32
    assert loaded.notices == []
    assert str(loaded.origins["data.seq_len"]) == f"{path}:1"
    assert str(loaded.origins["model.dtype"]) == f"{path}:2"
    assert str(loaded.origins["data.packed_length"]) == "derived"
    assert str(loaded.origins["lr_scheduler.total_steps"]) == "derived"
    assert str(loaded.origins["adam.lr"]) == "default"


def test_lines_are_those_of_the_last_assignment(write):
    path = write(
        """\
        model = dict(
            vocab_size=64,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=4,
        )
        model["dtype"] = "torch.float32"
        model.update(
            hidden_size=64,
        )
        data: dict = {
            "seq_len": 16,
            "micro_bsz": 2,
            "total_steps": 3,
        }
        if True:
            ckpt = dict(enable_save_ckpt=False)
        seed, JOB_NAME = 3, "x"
        """
    )
    lines = {key: origin.line for key, origin in load_config(path).origins.items() if origin.kind == "file"}
    assert lines == {
        "model.vocab_size": 2,
        "model.num_layers": 4,
        "model.num_attention_heads": 5,
        "model.dtype": 7,
        "model.hidden_size": 9,
        "data.seq_len": 12,
        "data.micro_bsz": 13,
        "data.total_steps": 14,
        "ckpt.enable_save_ckpt": 17,
        "seed": 18,
        "JOB_NAME": 18,
    }


def test_helpers_of_the_file_are_no_keys(write):
    helpers = """
    from __future__ import annotations
    import math
    from pathlib import Path
    SEQ_LEN = 16
    MODEL_ONLY_FOLDER = "local:x"
    _private = 3
    def double(x):
        return 2 * x
    """
    path = write(textwrap.dedent(helpers) + textwrap.dedent(GOOD))
    assert load_config(path).config.data.seq_len == 16


def test_a_lower_case_unknown_name_is_an_error_with_line_and_suggestion(write):
    path = write(textwrap.dedent(GOOD) + "modle_type = 'LLAMA2'\nsequence = 3\n")
    found = mistakes(path)
    assert found[0] == f"{path}:4: modle_type is not a known key. Did you mean 'model_type'?"
    assert found[1].startswith(f"{path}:5: sequence is not a known key.") and "capitals" in found[1]


def test_unknown_nested_keys(write):
    path = write(
        """\
        data = dict(seq_len=16, micro_bsz=2, total_steps=10,
                    micro_nun=3)
        model = dict(vocab_size=64, hidden_size=32, num_layers=2, num_attention_heads=4)
        ckpt = dict(enable_save_ckpt=False)
        lr_scheduler = dict(
            warmup_ratio=0.1,
            weight_decay=1e-4,
        )
        """
    )
    assert mistakes(path) == [
        f"{path}:2: data.micro_nun is not a known key. Did you mean 'micro_num'?",
        f"{path}:7: lr_scheduler.weight_decay is not a known key. There is 'adam.weight_decay'.",
    ]


def test_all_kinds_of_mistakes_come_together(write):
    path = write(
        """\
        data = dict(seq_len="long", micro_bsz=2, total_steps=10, gradient_accumulation=3)
        model = dict(vocab_size=64, hidden_size=34, num_layers=2, num_attention_heads=4, norm_type="batchnorm")
        ckpt = dict(save_ckpt_folder="runs")
        parallel = dict(tensor=dict(size=2), zero1=dict(size=3))
        adam = dict(lr=-1, beta=3)
        output_tf32 = True
        """
    )
    found = "\n".join(mistakes(path, world_size=8))
    for part in (
        ":1: data.seq_len = 'long': it must be a valid integer",
        ":1: data.gradient_accumulation = 3 must equal data.micro_num = 1",
        ":2: model.norm_type = 'batchnorm': it must be one of 'rmsnorm' or 'layernorm'",
        ":2: model.hidden_size = 34 is not divisible by model.num_attention_heads = 4",
        ":3: ckpt.checkpoint_every = None: saving is on",
        ":6: output_tf32 = True: tf32 for the head alone is not yet supported; set it to False",
        ":4: parallel.zero1.size = 3 does not divide the 4 ranks of the same weights; use -1 (all of them) or "
        "one of 1, 2, 4",
        ":5: adam.lr = -1: it must be greater than or equal to 0",
        ":5: adam.beta is not a known key.",
    ):
        assert part in found, part
    assert found.count("\n") == 8


def test_a_wrong_value_raises_no_second_mistake(write):
    """A rule is not applied to a value that was wrong in itself."""
    path = write(GOOD.replace("seq_len=16", "seq_len=16, micro_num='x', gradient_accumulation=4"))
    assert [m.split(": ", 1)[1].split(" =")[0] for m in mistakes(path)] == ["data.micro_num"]


def test_missing_sections_and_keys(write):
    path = write("model = dict(vocab_size=64, hidden_size=32, num_layers=2)\nckpt = dict(enable_save_ckpt=False)\n")
    assert mistakes(path) == [
        f"{path}: data is missing: give data = dict(...) with at least seq_len, micro_bsz, total_steps",
        f"{path}:1: model.num_attention_heads is missing: Query heads.",
    ]


def test_a_section_that_is_no_dict(write):
    path = write(textwrap.dedent(GOOD) + "adam = 3\n")
    assert mistakes(path) == [f"{path}:4: adam = 3: it must be a dict"]


def test_a_value_that_fits_no_part_of_a_union_is_one_mistake(write):
    path = write(textwrap.dedent(GOOD) + "generation = dict(eos_id='x')\n")
    (found,) = mistakes(path)
    assert found.startswith(f"{path}:4: generation.eos_id = 'x': it must be a valid integer")


def test_incomplete_optional_section(write):
    path = write(GOOD.replace('dtype="torch.float32"', "rope_scaling=dict(factor=2)"))
    assert mistakes(path) == [f"{path}:2: model.rope_scaling.type is missing: Kind of scaling."]


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = = 1\n", ":1: SyntaxError: invalid syntax"),
        ("import math\nA = math.nothing\n", ":2: AttributeError: module 'math' has no attribute 'nothing'"),
        ("A = 1\n\nB = dict(a=UNKNOWN)\n", ":3: NameError: name 'UNKNOWN' is not defined"),
        ("import no_such_module_here\n", ":1: ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("def f():\n    return 1 / 0\nA = f()\n", ":2: ZeroDivisionError: division by zero"),
    ],
)
def test_bad_python(write, text, message):
    path = write(text)
    (found,) = mistakes(path)
    assert found == f"{path}{message}"


def test_missing_file(tmp_path):
    assert mistakes(tmp_path / "no.py") == [f"{tmp_path / 'no.py'}: the config file does not exist"]
    (found,) = mistakes(tmp_path)
    assert found.startswith(f"{tmp_path}: the config file cannot be read")


BASES = {
    "_base_/runtime.py": "WIDTH = 32\nenable_tb = False\nadam = dict(\n    lr=3e-4,\n)\n",
    "_base_/models/tiny.py": "model_type = 'LLAMA2'\n"
    "model = dict(vocab_size=64, hidden_size=32, num_layers=2, num_attention_heads=4,\n    dtype='torch.float32')\n",
}
REST = "data = dict(seq_len=16, micro_bsz=2, total_steps=10)\nckpt = dict(enable_save_ckpt=False)\n"


@pytest.mark.parametrize(
    "importing",
    [
        "from internlm.config import read_base",
        "from internlm.utils.utils import read_base",  # InternEvo
        "from mmengine.config import read_base",
        "import internlm.config as ic",
    ],
)
@pytest.mark.parametrize("prefix", ["configs._base_", "_base_", "._base_"])
def test_inheritance(write, importing, prefix):
    for name, text in BASES.items():
        write(text, f"configs/{name}")
    call = "ic.read_base()" if importing.endswith(" ic") else "read_base()"
    path = write(
        f"{importing}\nwith {call}:\n    from {prefix}.runtime import *\n    from {prefix}.models.tiny import *\n"
        f"JOB_NAME = f'w{{WIDTH}}'\nmodel['num_layers'] = 3\n{REST}",
        "configs/run.py",
    )
    loaded = load_config(path)
    assert (loaded.config.JOB_NAME, loaded.config.model_type, loaded.config.enable_tb) == ("w32", "LLAMA2", False)
    assert (loaded.config.adam.lr, loaded.config.model.num_layers) == (3e-4, 3)
    base = path.parent.resolve() / "_base_"
    assert str(loaded.origins["adam.lr"]) == f"{base / 'runtime.py'}:4"
    assert str(loaded.origins["model.dtype"]) == f"{base / 'models/tiny.py'}:3"
    assert str(loaded.origins["model.num_layers"]) == f"{path}:6"


def test_inheritance_from_a_folder_above_and_by_name(write):
    for name, text in BASES.items():
        write(text, name)
    path = write(
        "from internlm.config import read_base\nwith read_base():\n    from ..._base_.models.tiny import model\n"
        "    from _base_.runtime import adam as old, WIDTH\n" + REST + "adam = dict(old, weight_decay=0.5)\ndel old\n",
        "a/b/run.py",
    )
    config = load_config(path).config
    assert (config.model.vocab_size, config.model_type) == (64, "INTERNLM")
    assert (config.adam.lr, config.adam.weight_decay, config.enable_tb) == (3e-4, 0.5, True)


def test_a_base_is_read_anew_each_time(write):
    for name, text in BASES.items():
        write(text, name)
    text = "from internlm.config import read_base\nwith read_base():\n    from _base_.models.tiny import *\n" + REST
    changed = write(text + "model['vocab_size'] = 128\n", "changed.py")
    plain = write(text, "plain.py")
    assert load_config(changed).config.model.vocab_size == 128
    assert load_config(plain).config.model.vocab_size == 64


def test_inheritance_mistakes(write):
    path = write("from internlm.config import read_base\nwith read_base():\n    from _base_.nothing import *\n")
    (found,) = mistakes(path)
    assert found.startswith(f"{path}:2: the base config _base_/nothing.py was not found")
    write("x = 1\n", "one.py")
    path = write("with read_base():\n    from one import y\n")
    assert mistakes(path) == [f"{path}:1: the base config has no 'y'"]
    path = write("with read_base():\n    import one\n")
    assert mistakes(path) == [f"{path}:2: only `from ... import ...` may be in read_base()"]
    path = write("with read_base():\n    from config import *\n")
    (found,) = mistakes(path)
    assert "inherits from itself" in found
    write("A = 1\nB = 1 / 0\n", "broken.py")
    (found,) = mistakes(write("with read_base():\n    from broken import *\n"))
    assert found.endswith("broken.py:2: ZeroDivisionError: division by zero")


def test_read_base_does_nothing_by_itself():
    with read_base() as nothing:
        assert nothing is None


def test_sections_may_be_built_as_objects(write):
    path = write(
        "from pathlib import Path\nfrom internlm.config.schema import DataConfig, ModelConfig\n"
        "data = DataConfig(seq_len=16, micro_bsz=2, total_steps=10)\n"
        "model = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_attention_heads=4)\n"
        "ckpt = dict(save_ckpt_folder=Path('runs') / 'x', checkpoint_every=5)\n"
    )
    loaded = load_config(path, ["model.num_layers=4", "data.micro_num=2"])
    assert (loaded.config.model.num_layers, loaded.config.data.gradient_accumulation) == (4, 2)
    assert loaded.config.ckpt.save_ckpt_folder == "runs/x"


def test_notices(write):
    path = write(
        """\
        data = dict(seq_len=16, micro_bsz=2, total_steps=10, packed_length=999)
        model = dict(vocab_size=64, hidden_size=32, num_layers=2, num_attention_heads=4, parallel_output=False)
        ckpt = dict(enable_save_ckpt=False, oss_snapshot_freq=25, load_ckpt_info=dict(path=None))
        use_apex_adam = True
        loss = dict(op_type="flash_vocab_parallel")
        parallel = dict(fsdp=dict(enable=True, mode="v1", init_method="cuda"), weight=dict(layer_fuse_isp_comm=True))
        """
    )
    notices = [
        notice for notice in load_config(path).notices if "not set" not in notice or notice.startswith("model.dtype")
    ]
    assert sorted(notices) == sorted(
        [
            "all differences from InternEvo are listed in doc/from_internevo.md",
            "model.dtype not set: torch.bfloat16, with InternEvo torch.float16 (dtype; bfloat16 needs no loss scale)",
            "data.packed_length = 999 is ignored: it is always data.seq_len * data.micro_bsz = 32",
            "no effect: model.parallel_output = False (the loss of split logits equals that of full ones)",
            "no effect: use_apex_adam = True (torch's fused AdamW is used)",
            "no effect: parallel.fsdp.mode = 'v1' (torch's fully_shard, which is v2, is always used)",
            "no effect: parallel.fsdp.init_method = 'cuda' (models are built on the meta device, then materialized)",
            "no effect: parallel.weight.layer_fuse_isp_comm = True (weights that share an input are always gathered "
            "together)",
            "no effect: loss.op_type = 'flash_vocab_parallel' (one fused cross entropy serves every kind)",
            "no effect: ckpt.oss_snapshot_freq (saving is off)",
            "ckpt.load_ckpt_info has no path: nothing is loaded from it",
        ]
    )


@pytest.mark.parametrize(
    "pipeline, chunks, notice",
    [
        (dict(size=1), 2, "model.num_chunks = 2 is ignored: there is no pipeline"),
        (dict(size=2, mode="ZBV"), 1, "model.num_chunks = 1 is ignored: a stage of ZBV has 2 chunks"),
        (dict(size=2, mode="dualpipev"), 4, "model.num_chunks = 4 is ignored: a stage of DUALPIPEV has 2 chunks"),
        (dict(size=2, mode="ZBV"), 2, None),
        (dict(size=1), 1, None),
    ],
)
def test_a_number_of_chunks_that_cannot_be_is_told(write, pipeline, chunks, notice):
    text = textwrap.dedent(GOOD) + f"model['num_chunks'] = {chunks}\nparallel = dict(pipeline={pipeline})\n"
    path = write(text + "model['num_layers'] = 4\ndata['micro_num'] = 4\n")
    notices = [line for line in load_config(path, world_size=pipeline["size"]).notices if "num_chunks" in line]
    assert notices == ([notice] if notice else [])


@pytest.mark.parametrize(
    "changes, ranks, notice",
    [
        (
            ["parallel.pipeline.size=2", "data.micro_num=4", "data.gradient_accumulation=2"],
            2,
            "data.gradient_accumulation = 2 is ignored: a pipeline accumulates all data.micro_num = 4 micro-batches",
        ),
        (
            ["parallel.pipeline.size=2", "parallel.pipeline.mode=ZBV", "data.micro_num=3", "model.num_layers=4"],
            2,
            "data.micro_num = 3: ZBV keeps its stages busy with 2 * parallel.pipeline.size = 4 micro-batches or more",
        ),
        (
            ["parallel.tensor.size=2", "model.vocab_size=63"],
            2,
            "model.vocab_size = 63 is not divisible by parallel.tensor.size = 2: the last shards are padded "
            "with unused rows",
        ),
        (
            ["parallel.weight.size=4", "parallel.tensor.mode=isp", "model.vocab_size=63"],
            4,
            "model.vocab_size = 63 is not divisible by parallel.weight.size = 4: the last shards are padded "
            "with unused rows",
        ),
        (["parallel.tensor.size=2", "parallel.tensor.mode=isp", "model.vocab_size=63"], 2, None),
        (
            ["parallel.tensor.size=4", "model.hidden_size=30", "model.head_dim=8"],
            4,
            "model.embed_split_hidden = True is ignored: model.hidden_size = 30 is not divisible by "
            "parallel.tensor.size = 4, so the vocabulary of the embedding is split",
        ),
        (["parallel.tensor.size=4", "model.hidden_size=30", "model.head_dim=8", "parallel.tensor.mode=isp"], 4, None),
        (
            ["parallel.fsdp.enable=True", "parallel.zero1.size=1"],
            2,
            "parallel.zero1.size = 1: FSDP shards weights over these ranks, so they are not sharded; set it to -1",
        ),
        (["parallel.fsdp.enable=True"], 2, None),
        (
            ["selective_checkpoint=True"],
            1,
            "no effect: selective_checkpoint = True (no layer is recomputed: model.checkpoint = 0.0; set it to 1 for "
            "all layers)",
        ),
        (
            ["model.checkpoint_save_policy=matmuls", "model.checkpoint=0.3"],
            1,
            "no effect: model.checkpoint_save_policy = 'matmuls' (no layer is recomputed: model.checkpoint = 0.3; set "
            "it to 1 for all layers)",
        ),
        (["selective_checkpoint=True", "model.checkpoint=0.5"], 1, None),
        (
            ["data.valid_every=5"],
            1,
            "no effect: data.valid_every = 5 (data.valid_folder is None: there is nothing to evaluate, where InternEvo "
            "takes random tokens)",
        ),
        (
            ["data.valid_folder=/data/valid"],
            1,
            "no effect: data.valid_folder = '/data/valid' (data.valid_every = 0 turns evaluation off: give the steps "
            "between evaluations)",
        ),
        (["data.valid_folder=/data/valid", "data.valid_every=5"], 1, None),
        (
            ["model.dtype=torch.bfloat16", "reduce_comm_dtype=torch.float16"],
            1,
            "reduce_comm_dtype = 'torch.float16' with model.dtype = 'torch.bfloat16': there is no loss scale, so "
            "elements of gradients below 3e-8 become 0 in communication, those below 6e-5 lose digits, and a sum above "
            "65,504 skips the update; 'torch.bfloat16' takes as many bytes and has the range of fp32",
        ),
        (["model.dtype=torch.float16", "reduce_comm_dtype=torch.float16"], 1, None),
        (
            ["cpu_offloading.enable=True"],
            1,
            "no effect: cpu_offloading.enable = True (cpu_offloading.num_layers = 0: give the number of layers)",
        ),
        (["parallel.pipeline.size=2", "parallel.pipeline.mode=ZBV", "data.micro_num=4", "model.num_layers=4"], 2, None),
    ],
)
def test_what_a_layout_does_unasked_is_told(write, changes, ranks, notice):
    assert load_config(write(GOOD), changes, world_size=ranks).notices == ([notice] if notice else [])


def test_folders_from_the_environment(write, monkeypatch):
    monkeypatch.setenv("tensorboard_folder", "/tb")
    loaded = load_config(write(GOOD))
    assert loaded.config.tensorboard_folder == "/tb"
    assert str(loaded.origins["tensorboard_folder"]) == "environment"
    given = load_config(write(textwrap.dedent(GOOD) + "tensorboard_folder = 'mine'\n"))
    assert given.config.tensorboard_folder == "mine"


def test_printed_config_names_every_key_once_with_value_and_origin(write):
    path = write(GOOD)
    text = format_config(load_config(path, ["adam.lr=0.5"]))
    lines = {line.split(" = ")[0].strip(): line for line in text.splitlines()}
    assert len(lines) == len(text.splitlines())
    assert lines["data.seq_len"].split("=")[1].split() == ["16", "#", f"{path}:1"]
    assert lines["adam.lr"].split("=")[1].split() == ["0.5", "#", "--set"]
    assert lines["data.packed_length"].split("=")[1].split() == ["32", "#", "derived"]


def test_a_config_built_in_python_is_checked_too():
    model = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_attention_heads=4)
    data = DataConfig(seq_len=16, micro_bsz=2, total_steps=10)
    check_config(Config(model=model, data=data, ckpt=CkptConfig(enable_save_ckpt=False)))
    with pytest.raises(ConfigError) as error:
        check_config(Config(model=model, data=data, int8_training=True, selective_checkpoint_offload=True))
    assert len(error.value.mistakes) == 4
