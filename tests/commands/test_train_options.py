"""Options of `internlm train` that train nothing, and those that InternEvo's users bring along."""

import os
import re

import pytest
from helpers.commands import LAUNCHER_VARIABLES, write_config
from helpers.forked import run_forked

from internlm.cli import main
from internlm.commands import train as command
from internlm.core.context.parallel_context import ParallelContext


@pytest.fixture
def train(tmp_path):
    write_config(tmp_path)
    return lambda *arguments, code=0, **environment: run_forked(tmp_path, run, arguments, code, environment)


def run(arguments, code, environment):
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(environment)
    assert main(["train", "--config", "config.py", *arguments]) == code


def test_options_of_internevo_have_a_notice(train):
    text = train(
        *("--dry_run", "--host", "10.0.0.1", "--rank", "3", "--local_rank=1", "--enable_ali_topology"),
        *("--disable_volc_topology", "--port", "8888", "--launcher", "none"),
    )
    here = "(this is one process without a launcher; torchrun and srun start more)"
    assert [line for line in text.splitlines() if line.startswith("notice: no effect: --")] == [
        f"notice: no effect: --host 10.0.0.1 {here}",
        f"notice: no effect: --rank 3 {here}",
        f"notice: no effect: --local-rank 1 {here}",
        f"notice: no effect: --port 8888 {here}",
        "notice: no effect: --enable-ali-topology (ranks are numbered as the launcher numbers them)",
        "notice: no effect: --disable-volc-topology (ranks are numbered as the launcher numbers them)",
    ]


def test_a_run_is_no_other_for_them(train):
    text = train("--world_size", "8", "--rank", "5", "--set", "data.total_steps=1", "--set", "ckpt.checkpoint_every=5")
    assert "no effect: --rank 5" in text and "no effect: --world-size 8 (this is one process" in text
    assert "done: 1 steps" in text


def train_and_show_limits():
    connect, create = command.connect, ParallelContext.create

    def connect_and_show(launch, device, backend, timeout_seconds=None):
        print(f"limit of the job's group: {timeout_seconds}")
        connect(launch, device, backend, timeout_seconds)

    def create_and_show(layout, device, timeout_seconds=None):
        print(f"limit of the others: {timeout_seconds}")
        return create(layout, device, timeout_seconds)

    command.connect, ParallelContext.create = connect_and_show, create_and_show
    run(["--set", "data.total_steps=1", "--set", "monitor.collective_timeout_seconds=77"], 0, {})


def test_every_group_of_a_run_gets_the_time_limit(tmp_path):
    write_config(tmp_path)
    text = run_forked(tmp_path, train_and_show_limits)
    limit = 77 + command.BACKSTOP_SECONDS
    assert f"limit of the job's group: {limit}" in text and f"limit of the others: {limit}" in text


def test_the_launcher_is_named(train):
    text = train(
        *("--dry-run", "--rank", "1", "--port", "7000"),
        SLURM_PROCID="0",
        SLURM_NPROCS="2",
        SLURM_STEP_ID="0",
        SLURM_LOCALID="0",
        MASTER_ADDR="head",
    )
    assert "no effect: --rank 1 (this is rank 0 of 2 at head:7000, as srun chose)" in text
    assert "no effect: --port" not in text


@pytest.mark.parametrize("option", ["--world-size", "--world_size"])
def test_a_config_is_shown_for_any_number_of_ranks(train, option):
    more = ("--set", "parallel.zero1.size=4")
    text = train("--print-config", option, "8", *more)
    assert re.search(r"^parallel\.zero1\.size += 4 ", text, re.MULTILINE)
    assert "on 8 rank(s)" in train("--dry-run", option, "8", *more)
    assert "parallel.zero1.size = 4" in train("--print-config", *more, code=2)
    assert "--world-size 0: the number of ranks must be at least 1" in train("--dry-run", option, "0", code=2)


def test_a_dry_run_tells_what_a_log_would(train):
    text = train("--dry-run", "--set", "use_apex_adam=True")
    assert "notice: no effect: use_apex_adam = True (torch's fused AdamW is used)" in text
    assert text.rstrip().endswith("the config is valid")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.train_folder=nowhere"], "nowhere: no such folder"),
        (["data.train_folder=."], r"\.: no \.bin file in this folder"),
        (["data.valid_folder=nowhere", "data.valid_every=5"], "nowhere: no such folder"),
        (["data.cache_bytes=1000"], "data.cache_bytes = 1000 is for data in an object store"),
        (["ckpt.load_ckpt_info=dict(path='nowhere')"], "there is no checkpoint at 'nowhere'"),
        (
            ["ckpt.load_ckpt_info=dict(path='nowhere', content=('model',), ckpt_type='hff')"],
            "unknown type 'hff', known: .* Did you mean 'hf'",
        ),
        (
            ["ckpt.save_ckpt_folder=config.py/x"],
            r"checkpoints cannot be saved to 'config\.py/x': .* is a file where a folder should be",
        ),
        (["ckpt.stop_file_path=config.py/stop"], "ckpt.stop_file_path = 'config.py/stop' cannot be written"),
        # The superuser has the permission, and others have not.
        (["ckpt.stop_file_path=/proc/x/stop"], "no file can be created in '/proc'|no permission to write to '/proc'"),
    ],
)
def test_a_dry_run_finds_what_the_start_finds(train, arguments, message):
    more = [word for value in arguments for word in ("--set", value)]
    for options in (["--dry-run"], []):
        text = train(*more, *options, code=2)
        assert re.search(message, text), text
        assert "Traceback" not in text


def test_a_dry_run_finds_all_at_once(train):
    text = train(
        *("--dry-run", "--set", "data.train_folder=nowhere", "--set", "ckpt.load_ckpt_info=dict(path='gone')"),
        *("--set", "ckpt.stop_file_path=config.py/stop"),
        code=2,
    )
    assert "nowhere: no such folder" in text and "no checkpoint at 'gone'" in text and "config.py/stop" in text


def test_a_dry_run_looks_for_the_tokenizer(train, tmp_path):
    text = train("--dry-run", "--set", "data.tokenizer_path=none.json")
    assert "notice: data.tokenizer_path = 'none.json': no such tokenizer; training does not need it" in text
    (tmp_path / "broken.json").write_text("{")
    text = train("--dry-run", "--set", "data.tokenizer_path=broken.json")
    assert "broken.json: the tokenizer cannot be read" in text


def test_a_dry_run_reads_the_index_of_the_data(train, tmp_path):
    folder = tmp_path / "data" / "en"
    folder.mkdir(parents=True)
    (folder / "a.bin").write_text('{"tokens": [1, 2, 3]}\n')
    assert "a.bin.meta" in train("--dry-run", "--set", "data.train_folder=data", code=2)


def test_a_dry_run_needs_a_run_directory_that_can_be_made(train):
    text = train("--dry-run", "--run-dir", "config.py/run", code=2)
    assert re.search(
        r"the run directory 'config\.py/run' cannot be written: .* is a file where a folder should be; give another",
        text,
    )
