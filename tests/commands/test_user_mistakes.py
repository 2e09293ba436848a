"""Every command, with mistakes that people make: one line that names the thing, exit code 2, and no traceback.

Nearly all run in this process. Files are broken in the same ways everywhere: absent, a folder, empty, unreadable,
garbage, cut off, of another kind.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.commands import LAUNCHER_VARIABLES, TINY_RUN
from helpers.processes import Forked
from helpers.runs import new_trainer
from helpers.tiny import tiny_config
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from internlm.checkpoint.reading import CONFIG_FILE
from internlm.cli import main
from internlm.config.schema import Config
from internlm.data.tokenize.command import main as tokenize_main

REPOSITORY = Path(__file__).parents[2]
VOCAB = 300


# -- what is good, to be broken ---------------------------------------------------------------------------------------


def save_tokenizer(path: Path) -> Path:
    """Byte-level, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: id for id, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path))
    return path


def save_checkpoint(folder: Path, tokenizer: Path) -> Path:
    trainer = new_trainer(folder, 1, vocab_size=VOCAB)
    config = Config.model_validate(
        {
            "model_type": "INTERNLM2",
            "model": tiny_config(vocab_size=VOCAB).model_dump(mode="json"),
            "data": {"seq_len": 32, "micro_bsz": 1, "total_steps": 1, "tokenizer_path": str(tokenizer)},
        }
    )
    assert trainer.checkpointer is not None
    trainer.checkpointer.files[CONFIG_FILE] = json.dumps(config.model_dump(mode="json"))  # type: ignore[attr-defined]
    trainer.save_checkpoint()
    return folder


def save_hf_folder(folder: Path) -> Path:
    """A Llama of one layer, with the keys that from-hf reads."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 16,
        "max_position_embeddings": 32,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (16, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (16, 8),
        **{f"{layer}self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"},
        f"{layer}mlp.gate_proj.weight": (16, 8),
        f"{layer}mlp.up_proj.weight": (16, 8),
        f"{layer}mlp.down_proj.weight": (8, 16),
        f"{layer}input_layernorm.weight": (8,),
        f"{layer}post_attention_layernorm.weight": (8,),
    }
    save_file({name: torch.rand(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of everything."""
    folder = tmp_path_factory.mktemp("good")
    text = TINY_RUN.replace("{folder}", str(folder))
    (folder / "config.py").write_text(text)
    save_checkpoint(folder / "run", save_tokenizer(folder / "tokenizer.json"))
    save_hf_folder(folder / "hf")
    (folder / "text.jsonl").write_text('{"text": "some text"}\n{"text": "and more"}\n')
    (folder / "text.txt").write_text("some text\n")
    (folder / "alpaca.json").write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}] * 4))
    (folder / "corpus.json").write_text('{"unigram_entropy": 5.0}')
    (folder / "metrics").mkdir()
    (folder / "metrics" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    return folder


# -- how a file is broken ---------------------------------------------------------------------------------------------


def absent(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def as_folder(path: Path) -> None:
    absent(path)
    path.mkdir()


def as_file(path: Path) -> None:
    absent(path)
    path.write_text("no folder")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(128, 256)) * 20)


def zeros(path: Path) -> None:
    path.write_bytes(b"\0" * 4096)


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def unreadable(path: Path) -> None:
    """As /proc/self/mem: it is there, and reading it fails, for root as well."""
    absent(path)
    path.symlink_to("/proc/self/mem")


def looping(path: Path) -> None:
    absent(path)
    path.symlink_to(path)


def latin(path: Path) -> None:
    path.write_bytes(b"caf\xe9 = [1\n")


def json_list(path: Path) -> None:
    path.write_text("[1, 2]")


def json_number(path: Path) -> None:
    path.write_text("7")


def json_null_values(path: Path) -> None:
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), None)))


def json_text_values(path: Path) -> None:
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), "x")))


def deep_json(path: Path) -> None:
    path.write_text("[" * 100_000)


Break = Callable[[Path], None]
ANY_FILE: tuple[Break, ...] = (absent, as_folder, empty, garbage, zeros, cut, unreadable, looping)
TEXT: tuple[Break, ...] = (*ANY_FILE, latin)
LINES: tuple[Break, ...] = (absent, as_folder, garbage, zeros, looping, latin, json_number, deep_json)
JSON: tuple[Break, ...] = (*TEXT, json_list, json_number, deep_json)
JSON_TABLE: tuple[Break, ...] = (*JSON, json_null_values, json_text_values)
FOLDER: tuple[Break, ...] = (absent, as_file, looping)

Run = Callable[[Path], int]


@dataclass
class Command:
    """A command line, in a folder of good things.

    Attributes:
        run: given the folder.
        files: what it reads -> how that may be broken.
    """

    run: Run
    files: dict[str, tuple[Break, ...]]


def cli(*words: str) -> Run:
    """`internlm` with words in which {} stands for the folder."""
    return lambda folder: main([word.replace("{}", str(folder)) for word in words])


def tool(name: str, *words: str) -> Run:
    def run(folder: Path) -> int:
        module, old = load_tool(name), sys.argv
        sys.argv = [name, *(word.replace("{}", str(folder)) for word in words)]
        try:
            return module.main()
        finally:
            sys.argv = old

    return run


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tokenizer(*words: str) -> Run:
    return lambda folder: tokenize_main([word.replace("{}", str(folder)) for word in words])


NEW_RUN = ("--run-dir", "{}/new", "--set", "ckpt.enable_save_ckpt=False", "--set", "data.total_steps=1")
MODEL = ("--ckpt", "{}/run", "--tokenizer", "{}/tokenizer.json")
GENERATE = ("generate", *MODEL, "--prompt", "a", "--max-new-tokens", "2", "--greedy")
CHECKPOINT_FILES: dict[str, tuple[Break, ...]] = {
    "run": FOLDER,
    "run/0": FOLDER,
    "run/0/config.json": JSON_TABLE,
    "run/0/context.json": JSON_TABLE,
    "run/0/0.step": JSON_TABLE,
    "run/0/.metadata": ANY_FILE,
}
WEIGHTS: dict[str, tuple[Break, ...]] = {"run/0/__0_0.distcp": ANY_FILE}

COMMANDS = {
    "train": Command(cli("train", "--config", "{}/config.py", *NEW_RUN), {"config.py": TEXT}),
    "dry-run": Command(cli("train", "--dry-run", "--config", "{}/config.py"), {"config.py": TEXT}),
    "layout": Command(cli("layout", "--world-size", "2", "--config", "{}/config.py"), {"config.py": TEXT}),
    "doctor": Command(cli("doctor", "--config", "{}/config.py"), {"config.py": TEXT}),
    "verify": Command(cli("verify", "--config", "{}/config.py", "--steps", "1"), {"config.py": TEXT}),
    "generate": Command(cli(*GENERATE), CHECKPOINT_FILES | WEIGHTS | {"tokenizer.json": JSON_TABLE}),
    "generate-hf": Command(
        cli("generate", "--ckpt", "{}/hf", "--tokenizer", "{}/tokenizer.json", "--prompt", "a"),
        {"hf": FOLDER, "hf/config.json": JSON_TABLE, "hf/model.safetensors": ANY_FILE},
    ),
    "ls": Command(cli("ckpt", "ls", "{}/run"), {"run": FOLDER}),
    "show": Command(cli("ckpt", "show", "{}/run"), CHECKPOINT_FILES),
    "diff": Command(cli("ckpt", "diff", "{}/run", "{}/run"), CHECKPOINT_FILES | WEIGHTS),
    "check": Command(cli("ckpt", "verify", "{}/run"), {"run": FOLDER}),
    "to-hf": Command(cli("convert", "to-hf", "--ckpt", "{}/run", "--out", "{}/out"), CHECKPOINT_FILES | WEIGHTS),
    "from-hf": Command(
        cli("convert", "from-hf", "--hf", "{}/hf", "--out", "{}/out"),
        {"hf": FOLDER, "hf/config.json": JSON_TABLE, "hf/model.safetensors": ANY_FILE},
    ),
    "upcycle": Command(
        cli("convert", "upcycle", "--ckpt", "{}/run", "--out", "{}/out", "--num-experts", "4", "--top-k", "2"),
        CHECKPOINT_FILES | WEIGHTS,
    ),
    "from-internevo": Command(cli("convert", "from-internevo", "--ckpt", "{}/run", "--out", "{}/out"), {"run": FOLDER}),
    "view": Command(cli("view", "{}/metrics"), {"metrics": FOLDER, "metrics/metrics.jsonl": (as_folder,)}),
    "tokenizer": Command(
        tokenizer("{}/text.jsonl", "--tokenizer", "{}/tokenizer.json", "--output", "{}/out/a.bin", "--processes", "1"),
        {"text.jsonl": LINES, "tokenizer.json": JSON_TABLE},
    ),
    "alpaca": Command(
        tool("alpaca_tokenizer", "{}/alpaca.json", "{}/out", "{}/tokenizer.json"),
        {"alpaca.json": (cut, json_list, *LINES), "tokenizer.json": JSON_TABLE},
    ),
    "report": Command(
        tool("demo_report", "--run-dir", "{}/metrics", "--corpus", "{}/corpus.json"),
        {"corpus.json": JSON_TABLE, "metrics": FOLDER, "metrics/metrics.jsonl": (*TEXT, json_number)},
    ),
}

BROKEN = [
    pytest.param(command, file, broken, id=f"{command}-{file}-{broken.__name__}")
    for command, entry in COMMANDS.items()
    for file, ways in entry.files.items()
    for broken in ways
]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("command", "file", "broken"), BROKEN)
def test_a_broken_file_is_told_in_one_line(
    good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str, file: str, broken: Break
) -> None:
    folder = tmp_path / "x"
    shutil.copytree(good, folder, symlinks=True)
    broken(folder / file)
    code = COMMANDS[command].run(folder)
    output = capfd.readouterr()
    assert "Traceback" not in output.err
    assert code == 2, output
    assert Path(file).name in output.err or Path(file).parts[0] in output.err


# -- values of options ------------------------------------------------------------------------------------------------

TRAIN = ("train", "--config", "{}/config.py", *NEW_RUN)
LAYOUT = ("layout", "--config", "{}/config.py")
VERIFY = ("verify", "--config", "{}/config.py")
TO_HF = ("convert", "to-hf", "--ckpt", "{}/run", "--out")
FROM_HF = ("convert", "from-hf", "--hf", "{}/hf", "--out")
TOKENIZE = ("{}/text.jsonl", "--tokenizer", "{}/tokenizer.json", "--processes", "1", "--output")
ALPACA = ("{}/alpaca.json", "{}/out", "{}/tokenizer.json")

OPTIONS: list[tuple[Run, str]] = [
    *((cli(*TRAIN, "--set", text), text.split("=")[0]) for text in (
        "nonsense=1", "=3", "data.total_steps", "data.total_steps=abc", "data.total_steps=-1", "data.seq_len=0",
        "model.num_layers=[1", "adam.lr=fast", "parallel.tensor.size=0", "data.=3",
        "model=7", "data=[]", "monitor.slow_step_seconds=0", "monitor.slow_step_seconds=nan",
        "monitor.collective_timeout_seconds=-1", "model.dtype=torch.int8", "ckpt.save_ckpt_folder=nowhere://x",
        "seed=-1", "JOB_NAME=", "model_type=NOBODY",
    )),
    *((cli(*TRAIN, "--set", f"data.train_folder={{}}/{text}"), text) for text in ("absent", "config.py", "hf")),
    (cli(*TRAIN, "--set", "data.total_steps.x=1"), "data.total_steps"),
    (cli("train", "--config", "{}/config.py", "--run-dir", "{}/text.txt"), "text.txt"),
    (cli("train", "--config", "{}/config.py", "--run-dir", "/proc/nothing"), "/proc/nothing"),
    (cli("train", "--config", "{}/config.py", "--run-dir", "{}/" + "x" * 300), "x" * 300),
    (cli(*TRAIN, "--set", "model.vocab_size=1000000000000"), "memory"),
    (cli(*TRAIN, "--seed", "-1"), "--seed"),
    (cli(*TRAIN, "--seed", "x"), "--seed"),
    (cli(*TRAIN, "--launcher", "torch"), "RANK"),
    (cli(*TRAIN, "--launcher", "slurm"), "SLURM"),
    (cli(*TRAIN, "--launcher", "x"), "--launcher"),
    (cli(*TRAIN, "--dry-run", "--world-size", "0"), "--world-size"),
    (cli(*TRAIN, "--dry-run", "--world-size", "x"), "--world-size"),
    (cli("train"), "--config"),
    (cli("train", "--config"), "--config"),
    (cli("train", "--config", ""), "."),
    (cli("train", "--config", "{}/\udcff.py"), "udcff"),
    (cli("nonsense"), "nonsense"),
    (cli(), "COMMAND"),
    *((cli(*LAYOUT, "--world-size", text), "--world-size") for text in ("0", "-1", "x")),
    *((cli(*LAYOUT, "--world-size", "2", "--rank", text), "--rank") for text in ("2", "-1", "x")),
    *((cli(*LAYOUT, "--world-size", "2", "--png", text), text.split("/")[-1]) for text in (
        "{}/absent/x.png", "{}/hf", "{}/text.txt/x.png", "/proc/x.png")),
    *((cli(*LAYOUT, "--world-size", "2", "--width", text), "--width") for text in ("-5", "x")),
    *((cli(*VERIFY, "--steps", text), "--steps") for text in ("0", "-1", "x")),
    *((cli(*VERIFY, "--world-size", text), "--world-size") for text in ("0", "-1", "100000")),
    *((cli(*VERIFY, "--layout", text), text.split("=")[0]) for text in ("x", "tensor=", "tensor=x", "tensor=3", "x=1")),
    (cli("verify"), "--config"),
    (cli("verify", "--matrix", "--config", "{}/config.py"), "--matrix"),
    (cli(*VERIFY, "--output", "{}/x"), "--output"),
    (cli("doctor", "--nonsense"), "--nonsense"),
    (cli("doctor", "--set", "seed=1"), "--set"),
    (cli("doctor", "--config", "{}/config.py", "--world-size", "x"), "--world-size"),
    (cli("doctor", "--config", "{}/config.py", "--world-size", "0"), "--world-size"),
    *((cli("generate", *MODEL, "--prompt", "a", "--temperature", text), "temperature") for text in (
        "0", "-1", "nan", "inf", "1e-40", "x")),
    *((cli("generate", *MODEL, "--prompt", "a", "--top-p", text), "top") for text in ("0", "-1", "2", "nan")),
    *((cli("generate", *MODEL, "--prompt", "a", "--top-k", text), "top") for text in ("-1", "x")),
    *((cli("generate", *MODEL, "--prompt", "a", "--max-new-tokens", text), "max") for text in ("0", "-1", "1.5")),
    *((cli(*GENERATE, "--device", text), "--device") for text in ("nonsense", "cuda:99", "cpu:x", "", "meta")),
    *((cli("generate", *MODEL, "--prompt", "a", "--seed", text), "--seed") for text in ("x", "1" * 30, "-" + "1" * 30)),
    *((cli("generate", *MODEL, "--prompt", text), "prompt") for text in ("", "\udcff", "caf\udce9 au lait")),
    (cli("generate", *MODEL), "--prompt"),
    *((cli(*GENERATE, "--output", "{}/out", "--logprobs", text), "--logprobs") for text in ("-1", "1" * 9, "x")),
    *((cli("generate", *MODEL, "--prompt", "a", "--min-p", text), "--min-p") for text in ("-1", "2", "nan", "x")),
    *((cli(*GENERATE, "--repetition-penalty", text), "--repetition-penalty") for text in ("0", "-1", "nan", "inf")),
    *((cli(*GENERATE, name, text), name) for name in ("--samples", "--beams", "--batch") for text in ("0", "-1", "x")),
    *((cli("generate", *MODEL, "--prompts", text), text.split("/")[-1]) for text in (
        "{}/absent", "{}/hf", "{}/text.txt", "/proc")),
    *((cli(*GENERATE, "--output", text), text.split("/")[-1]) for text in ("{}/hf", "{}/text.txt/x", "/proc/x")),
    *((cli("chat", *MODEL, option, text), needle) for option, text, needle in (
        ("--max-new-tokens", "0", "--max-new-tokens"), ("--chat-template", "{}/absent", "absent"),
        ("--stop", "", "--stop"), ("--device", "nonsense", "--device"))),
    *((cli("serve", *MODEL, "--port", text), "--port") for text in ("-1", "65536", "x")),
    *((cli("serve", *MODEL, "--timeout", text), "--timeout") for text in ("0", "-1", "nan", "inf", "x")),
    *((cli("serve", *MODEL, name, "-1"), name) for name in ("--batch", "--max-waiting", "--max-length")),
    *((cli("serve", *MODEL, "--api-key-file", text), text.split("/")[-1]) for text in (
        "{}/absent", "{}/hf", "/dev/null")),
    (cli("serve", *MODEL, "--chat-template", "{}/absent"), "absent"),
    (cli("serve", "--ckpt", "{}/absent"), "absent"),
    (cli("serve", *MODEL, "--host", "nowhere.invalid"), "nowhere.invalid"),
    (cli("serve", *MODEL, "--beside", "{}/absent"), "absent"),
    (cli("serve", *MODEL, "--beside", "{}/run", "--beside", "{}/run"), "--beside"),
    *((cli("serve", *MODEL, "--run", text), text.split("/")[-1]) for text in ("{}/absent", "{}/hf", "{}/text.txt")),
    *((cli("view", text), text.split("/")[-1]) for text in ("{}/absent", "{}/hf", "{}/text.txt", "/proc/self", "s3://x")),
    (cli("view", "{}"), "metrics"),
    (cli("view"), "RUN"),
    *((cli("view", "{}/metrics", "--port", text), "--port") for text in ("-1", "65536", "x")),
    (cli("view", "{}/metrics", "--host", "nowhere.invalid"), "nowhere.invalid"),
    (cli("view", "{}/metrics", "--host", ""), "--host"),
    *((cli("view", "{}/metrics", "--api-key-file", text), text.split("/")[-1]) for text in ("{}/absent", "/dev/null")),
    *((cli("eval", *MODEL, "--tasks", text), "--tasks") for text in ("", "a,,b", "a,a")),
    *((cli("eval", *MODEL, "--tasks", "a", name, text), name) for name in (
        "--limit", "--num-fewshot", "--max-length", "--batch", "--batch-tokens", "--seed") for text in ("-1", "x")),
    (cli("eval", *MODEL, "--tasks", "a", "--limit", "0.5"), "--limit"),
    *((cli("eval", *MODEL, "--tasks", "a", "--task-files", text), text.split("/")[-1]) for text in (
        "{}/absent", "{}/text.txt", "{}/hf")),
    *((cli("eval", *MODEL, "--tasks", "a", "--output", text), text.split("/")[-1]) for text in (
        "{}/text.txt", "{}/absent/x", "/proc/nothing/x")),
    (cli("eval", *MODEL), "--tasks"),
    (cli(*GENERATE, "--top-k", "3"), "top_k"),
    (cli("generate", "--ckpt", "{}/run", "--tokenizer", "{}/text.txt", "--prompt", "a"), "text.txt"),
    *((cli("generate", "--ckpt", text, "--prompt", "a"), text.split("/")[-1]) for text in (
        "nowhere://x", "{}/text.txt", "{}/hf", "{}/absent", "{}", "/proc")),
    (cli("generate", "--ckpt", "\udcff", "--prompt", "a"), "udcff"),
    *((cli("ckpt", "ls", text), text.split("/")[-1]) for text in ("nowhere://x", "{}/absent", "{}/text.txt")),
    *((cli("ckpt", "show", text), text.split("/")[-1]) for text in (
        "nowhere://x", "{}/absent", "{}/text.txt", "{}/hf")),
    *((cli("ckpt", "verify", text), text.split("/")[-1]) for text in ("nowhere://x", "{}/absent", "{}/text.txt")),
    *((cli("ckpt", "diff", "{}/run", text), text.split("/")[-1]) for text in ("nowhere://x", "{}/absent", "{}/hf")),
    (cli("ckpt", "show", "{}/run", "--tensors", "nothing-like-it"), "nothing-like-it"),
    (cli("ckpt", "nonsense"), "nonsense"),
    *((cli(*TO_HF, text), text.split("/")[-1]) for text in (
        "{}/hf", "{}/text.txt", "{}/text.txt/x", "/proc/x", "nowhere://x")),
    *((cli(*TO_HF, "{}/out", "--max-shard-size", text), "max-shard-size") for text in ("0", "-1GB", "x", "1XB", "")),
    (cli(*TO_HF, "{}/out", "--tokenizer", "{}/absent"), "absent"),
    (cli(*TO_HF, "{}/out", "--dtype", "x"), "--dtype"),
    *((cli(*FROM_HF, text), text.split("/")[-1]) for text in ("{}/text.txt", "{}/text.txt/x", "/proc/x", "nowhere://x")),
    *((cli("convert", "from-hf", "--hf", text, "--out", "{}/out"), text.split("/")[-1]) for text in (
        "{}/run", "{}/text.txt", "nowhere://x", "/proc", "{}/absent")),
    *((cli("convert", "from-internevo", "--ckpt", text, "--out", "{}/out"), text.split("/")[-1]) for text in (
        "{}/hf", "{}/text.txt", "nowhere://x", "/proc", "{}/absent")),
    *((tokenizer(*TOKENIZE, text), text.split("/")[-1]) for text in ("{}/hf", "{}/text.txt/x", "/proc/x")),
    *((tokenizer(*TOKENIZE, "{}/out/a.bin", *more), more[0]) for more in (
        ("--processes", "0"), ("--processes", "-1"), ("--processes", "x"), ("--format", "x"), ("--nonsense",))),
    (tokenizer("{}/text.jsonl", "--tokenizer", "{}/tokenizer.json"), "--output"),
    (tokenizer("{}/text.jsonl", "--output", "{}/a.bin"), "--tokenizer"),
    (tokenizer("--output", "{}/a.bin"), "input"),
    (tokenizer("{}/absent", *TOKENIZE[1:], "{}/out/a.bin"), "absent"),
    (tokenizer("{}/text.jsonl", "--tokenizer", "{}/new.json", "--train", "x"), "--train"),
    (tokenizer("{}/text.jsonl", "--tokenizer", "{}/new.json", "--train", "1"), "1"),
    (tokenizer("{}/text.jsonl", "--tokenizer", "{}/text.txt/new.json", "--train", "258"), "text.txt"),
    (tokenizer("--rebuild-meta", "{}/absent.bin"), "absent.bin"),
    (tokenizer("--rebuild-meta", "{}/hf"), "hf"),
    (tokenizer("--rebuild-meta", "{}/text.txt"), "text.txt"),
    *((tool("alpaca_tokenizer", *ALPACA, "--valid-fraction", text), "fraction") for text in ("2", "-1", "nan", "x")),
    *((tool("alpaca_tokenizer", *ALPACA[:1], text, *ALPACA[2:]), text.split("/")[-1]) for text in (
        "{}/text.txt", "/proc/x")),
    *((tool("prepare_demo_data", "--out", "{}/demo", *more), more[0][2:]) for more in (
        ("--max-bytes", "0"), ("--max-bytes", "nan"), ("--max-bytes", "inf"), ("--max-bytes", "-1"),
        ("--vocab", "1"), ("--vocab", "x"), ("--processes", "0"))),
    (tool("prepare_demo_data", "--out", "{}/text.txt"), "text.txt"),
    (tool("prepare_demo_data", "--out", "/proc/x"), "/proc/x"),
    (tool("demo_report", "--run-dir", "{}/absent", "--corpus", "{}/corpus.json"), "absent"),
]  # fmt: skip


@pytest.mark.parametrize(("run", "named"), OPTIONS, ids=[str(number) for number in range(len(OPTIONS))])
def test_an_option_that_makes_no_sense_is_told_in_one_line(
    good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run: Run, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = run(good)
    except SystemExit as exit:  # of argparse
        code = exit.code
    output = capfd.readouterr()
    assert "Traceback" not in output.err
    assert code == 2, output
    assert named.replace("{}", str(good)) in output.err


# -- where the output goes --------------------------------------------------------------------------------------------

PRINTING = {
    "help": cli("--help"),
    "train-help": cli("train", "--help"),
    "print-config": cli("train", "--config", "{}/config.py", "--print-config"),
    "dry-run": cli("train", "--config", "{}/config.py", "--dry-run"),
    "layout": cli("layout", "--config", "{}/config.py", "--world-size", "2"),
    "generate": cli(*GENERATE),
    "ls": cli("ckpt", "ls", "{}/run"),
    "show": cli("ckpt", "show", "{}/run", "--tensors"),
    "diff": cli("ckpt", "diff", "{}/run", "{}/run"),
    "check": cli("ckpt", "verify", "{}/run"),
    "to-hf": cli("convert", "to-hf", "--ckpt", "{}/run", "--out", "out"),
    "from-hf": cli("convert", "from-hf", "--hf", "{}/hf", "--out", "out"),
    "tokenizer": tokenizer(*TOKENIZE, "out/a.bin"),
    "alpaca": tool("alpaca_tokenizer", "{}/alpaca.json", "out", "{}/tokenizer.json"),
    "report": tool("demo_report", "--run-dir", "{}/metrics", "--corpus", "{}/corpus.json"),
}


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def run_with(
    run: Run, good: Path, folder: Path, outputs: dict[int, Callable[[], int]], encoding: str = "utf-8"
) -> tuple[int, str]:
    """Exit code and output of a command in a process of its own, some of whose file descriptors lead elsewhere."""

    def work() -> int:
        os.chdir(folder)
        for number, target in outputs.items():
            os.dup2(target(), number)
        sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
        try:
            code = run(good)
        except SystemExit as exit:
            code = int(exit.code or 0)
        # As the interpreter does at its end, and fails with 120.
        sys.stdout.flush()
        sys.stderr.flush()
        return code

    process = Forked(work, folder / "output.txt")
    return process.wait(), process.output_file.read_bytes().decode(encoding)


@pytest.mark.parametrize("name", PRINTING)
def test_a_reader_that_has_gone_ends_a_command_without_a_word(good: Path, tmp_path: Path, name: str) -> None:
    code, output = run_with(PRINTING[name], good, tmp_path, {1: closed_pipe})
    assert code == 141
    assert "Traceback" not in output and "Broken" not in output and "rror" not in output


@pytest.mark.parametrize("name", ["print-config", "generate", "ls", "tokenizer", "report"])
def test_a_full_disk_behind_the_output_is_told(good: Path, tmp_path: Path, name: str) -> None:
    code, output = run_with(PRINTING[name], good, tmp_path, {1: full_disk})
    assert code == 2
    assert output.splitlines()[-1] == "error: the output cannot be written: No space left on device"
    assert "Traceback" not in output


def test_an_error_that_nobody_can_read_is_an_exit_code(good: Path, tmp_path: Path) -> None:
    both = {1: closed_pipe, 2: closed_pipe}
    assert run_with(cli("ckpt", "ls", "{}/absent"), good, tmp_path, both) == (2, "")
    assert run_with(COMMANDS["train"].run, good, tmp_path, both) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_characters_that_the_terminal_lacks_are_escaped(good: Path, tmp_path: Path, encoding: str) -> None:
    job = ("--config", "{}/config.py", "--set", "JOB_NAME=日本")
    for run in (
        cli("train", *job, "--print-config"),
        cli("train", *job, "--dry-run"),
        cli("layout", *job, "--world-size", "1"),
        cli("train", *job, *NEW_RUN[2:], "--run-dir", "new"),
    ):
        code, output = run_with(run, good, tmp_path, {}, encoding)
        assert code == 0, output
        assert "\\u65e5\\u672c" in output
    code, output = run_with(cli("generate", *MODEL, "--prompt", "日本", "--greedy"), good, tmp_path, {}, encoding)
    assert code == 0, output
    assert output.startswith("\\u65e5\\u672c")
    code, output = run_with(cli("train", "--config", "日本.py"), good, tmp_path, {}, encoding)
    assert (code, output) == (2, "error: \\u65e5\\u672c.py: the config file does not exist\n")


def test_a_config_in_another_encoding_is_read_as_python_reads_it(good: Path, tmp_path: Path) -> None:
    text = "# -*- coding: latin-1 -*-\n" + (good / "config.py").read_text() + 'JOB_NAME = "café"\n'
    (tmp_path / "config.py").write_bytes(text.encode("latin-1"))
    code, output = run_with(cli("train", "--config", "config.py", "--run-dir", "run", *NEW_RUN[2:]), good, tmp_path, {})
    assert code == 0, output
    assert "café" in output


def test_as_a_shell_runs_it(good: Path) -> None:
    """The interpreter's own end, too, says nothing."""
    command = [sys.executable, "-m", "internlm.cli", "train", "--config", str(good / "config.py"), "--print-config"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii", "LANG": "C"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141
