"""Who this process is, read from the launcher's variables."""

from __future__ import annotations

import pytest
import torch

from internlm.initialize.launch import (
    Launch,
    LaunchError,
    choose_device,
    collective_timeout,
    detect_launch,
    first_host_of,
)

TORCH = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29400"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NPROCS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_NODELIST": "gpu[03-06]",
}


@pytest.fixture(autouse=True)
def _no_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without SLURM's tools."""
    monkeypatch.setenv("PATH", "")


def test_without_a_launcher_there_is_one_process() -> None:
    assert detect_launch(environment={}) == Launch("none", 0, 1, 0)
    # An interactive shell inside an allocation is no rank of it.
    shell = {"SLURM_JOB_ID": "1", "SLURM_NPROCS": "4", "SLURM_NODELIST": "gpu01", "SLURM_PROCID": "0"}
    assert detect_launch(environment=shell).launcher == "none"
    assert detect_launch("none", environment={**TORCH, **SLURM}).world_size == 1


def test_torchrun_is_recognised() -> None:
    expected = Launch("torch", rank=3, world_size=8, local_rank=1, host="node7", port=29400)
    assert detect_launch(environment=TORCH) == expected
    assert detect_launch("torch", environment=TORCH) == expected
    # torchrun may run inside an allocation; and it has its meeting point already, whatever --port says.
    assert detect_launch(environment={**SLURM, **TORCH}) == expected
    assert detect_launch(port=1234, environment=TORCH) == expected


def test_srun_is_recognised() -> None:
    expected = Launch("slurm", rank=5, world_size=16, local_rank=1, host="gpu03", port=8888)
    assert detect_launch(environment=SLURM) == expected
    assert detect_launch("slurm", environment=SLURM) == expected
    assert detect_launch(environment={**SLURM, "MASTER_PORT": "7000"}).port == 7000
    assert detect_launch(port=7001, environment={**SLURM, "MASTER_PORT": "7000"}).port == 7001
    assert detect_launch(environment={**SLURM, "MASTER_ADDR": "head"}).host == "head"


@pytest.mark.parametrize("missing", sorted(TORCH))
def test_a_missing_variable_of_torchrun_is_named(missing: str) -> None:
    environment = {name: value for name, value in TORCH.items() if name != missing}
    with pytest.raises(LaunchError, match=rf"launcher 'torch' needs the variable {missing}.*torchrun"):
        detect_launch("torch", environment=environment)


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_NPROCS", "SLURM_LOCALID", "SLURM_NODELIST"])
def test_a_missing_variable_of_srun_is_named(missing: str) -> None:
    environment = {name: value for name, value in SLURM.items() if name != missing}
    with pytest.raises(LaunchError, match=rf"launcher 'slurm' needs the variable {missing}.*srun"):
        detect_launch("slurm", environment=environment)


@pytest.mark.parametrize(
    ("launcher", "name", "value"),
    [("torch", "RANK", "two"), ("torch", "MASTER_PORT", ""), ("slurm", "SLURM_NPROCS", "4(x2)"),
     ("slurm", "MASTER_PORT", "http")],
)  # fmt: skip
def test_a_variable_that_is_no_number_is_named(launcher: str, name: str, value: str) -> None:
    environment = {**(TORCH if launcher == "torch" else SLURM), name: value}
    with pytest.raises(LaunchError, match=rf"{name} = '{value.replace('(', '.').replace(')', '.')}' is not a number"):
        detect_launch(launcher, environment=environment)


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("localhost", "localhost"),
        ("node1,node2", "node1"),
        ("node[03-05,9],other1", "node03"),
        ("node[7]", "node7"),
        ("node[1,4-6]-ib", "node1-ib"),
        ("gpu-[001-128].cluster.org,cpu1", "gpu-001.cluster.org"),
        ("rack[2-3]node[04-08]", "rack2node04"),
        ("rack[2,3]node[04-08]x,login", "rack2node04x"),
    ],
)
def test_the_first_host_of_a_node_list(node_list: str, host: str) -> None:
    assert first_host_of(node_list) == host


@pytest.mark.parametrize("node_list", ["", "[1-2]", ",node1"])
def test_a_node_list_without_a_host_is_refused(node_list: str) -> None:
    with pytest.raises(LaunchError, match="names no host; set MASTER_ADDR"):
        first_host_of(node_list)


def test_the_time_that_a_rank_waits_for_another_one() -> None:
    assert collective_timeout(None, {}) == (1800.0, None)
    assert collective_timeout(12.5, {}) == (12.5, None)
    seconds, notice = collective_timeout(None, {"INTERNLM_ENABLE_TIMEOUT": "1"})
    assert seconds == 60.0 and notice is not None and "monitor.collective_timeout_seconds = 60;" in notice
    assert collective_timeout(None, {"INTERNLM_ENABLE_TIMEOUT": "0", "NCCL_TIMEOUT": "90"})[0] == 90.0
    assert collective_timeout(None, {"NCCL_TIMEOUT": "90"}) == (1800.0, None)
    given = collective_timeout(7.0, {"INTERNLM_ENABLE_TIMEOUT": "1"})
    assert given == (7.0, "INTERNLM_ENABLE_TIMEOUT is ignored: monitor.collective_timeout_seconds = 7 is set")
    with pytest.raises(LaunchError, match="NCCL_TIMEOUT = 'soon' is not a whole number of seconds"):
        collective_timeout(None, {"INTERNLM_ENABLE_TIMEOUT": "1", "NCCL_TIMEOUT": "soon"})


def test_more_ranks_than_gpus_are_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(Launch(local_rank=1)) == torch.device("cuda", 1)
    with pytest.raises(LaunchError, match="local rank 2 has no GPU: 2 are visible on this machine"):
        choose_device(Launch(local_rank=2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(Launch(local_rank=5)) == torch.device("cpu")
