"""The train command on data in an S3 server: the steps of the local folder, resuming, two ranks, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.chat_templates import save_chat_tokenizer
from helpers.commands import metrics_of, start_ranks, start_training, write_config
from helpers.data_folders import upload
from helpers.fault_proxy import Fault, FaultProxy
from helpers.s3 import Bucket

from internlm.data.megatron_files.writer import MegatronWriter
from internlm.data.tokenized_files.writer import TokenizedWriter

NAMES = ("cn/a", "cn/b", "en/a", "en/b", "en/c")


@pytest.fixture(autouse=True)
def _own_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))


def write_data(root: Path) -> Path:
    """A train folder and a validation folder, with files that are too large to be fetched at once with the names."""
    for seed, name in enumerate([*(f"train/{each}" for each in NAMES), "valid/en/d"]):
        random = np.random.default_rng(seed)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with TokenizedWriter(root / f"{name}.bin") as writer:
            for _ in range(60 if name.startswith("valid") else 800):
                writer.write(random.integers(1, 60, random.integers(2, 80)))
    return root


def keys_of(place: str | Path, **more: Any) -> dict[str, Any]:
    keys = {"train_folder": f"{place}/train", "valid_folder": f"{place}/valid", "valid_every": 4, "total_steps": 8}
    return keys | {"num_worker": 2} | more


def train(folder: Path, data: dict[str, Any], *arguments: object, run: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit code, output, and the metrics of a run, without those of time and memory."""
    config = write_config(folder / run, f"data.update({data!r})\n")
    command = start_training(["--config", config, "--run-dir", folder / run, *arguments], folder / f"{run}.txt")
    code = command.wait()
    lines = [
        {
            name: value
            for name, value in line.items()
            if name.startswith(("loss", "tokens/", "val", "grad_norm", "step"))
        }
        for line in metrics_of(folder / run)
    ]
    return code, command.output, lines


def fetched(cache: Path) -> int:
    return len([path for path in cache.rglob("*.bin") if "content" in path.parts])


def test_a_run_has_the_steps_of_the_local_folder_and_resumes(bucket: Bucket, tmp_path: Path) -> None:
    root = write_data(tmp_path / "data")
    url = upload(root, bucket, "data")
    code, output, local = train(tmp_path, keys_of(root), run="local")
    assert code == 0, output
    code, output, remote = train(tmp_path, keys_of(url), run="remote")
    assert code == 0, output
    assert remote == local and any(name.startswith("val") for line in local for name in line)
    assert "5 files with" not in output and "are fetched when they are needed, without a bound" in output
    # A bounded cache of its own, where the run is interrupted.
    size = max(path.stat().st_size for path in root.rglob("*.bin"))
    bounded = keys_of(url, cache_folder=str(tmp_path / "cache"), cache_bytes=3 * size)
    code, output, _ = train(tmp_path, bounded | {"total_steps": 5}, run="run")
    assert code == 0, output
    assert "read in random order, so they are fetched again and again; set data.shuffle_files" in output
    code, output, second = train(tmp_path, bounded, run="run")
    assert code == 0 and "resuming at step 5" in output, output
    # An interrupted run evaluates at its end, too.
    assert [line for line in second if "loss" in line] == [line for line in local if "loss" in line]
    # Files in use by two workers and the trainer may exceed the bound, by one each.
    assert fetched(tmp_path / "cache") <= 5


def test_ranks_share_the_files_of_a_window(bucket: Bucket, tmp_path: Path) -> None:
    root = write_data(tmp_path / "data")
    upload(root, bucket, "data")
    losses = {}
    with FaultProxy(bucket.port) as proxy:
        places = {"local": str(root), "remote": f"{bucket.url_through(proxy.port)}/data"}
        for name, place in places.items():
            keys = keys_of(place, shuffle_files=2, num_worker=1)
            # Connections drop while it runs.
            proxy.plan(Fault(cut_download=20_000), times=3, method="GET", text=".bin")
            proxy.plan(Fault(status=500), times=2, method="GET", text=".bin")
            config = write_config(tmp_path / name, f"data.update({keys!r})\n")
            ranks = start_ranks(["--config", config, "--run-dir", tmp_path / name], tmp_path / name)
            assert [rank.wait() for rank in ranks] == [0, 0], [rank.output for rank in ranks]
            losses[name] = [line["loss"] for line in metrics_of(tmp_path / name) if "loss" in line]
        whole = [seen for seen in proxy.seen if seen.method == "GET" and seen.path.endswith(".bin")]
        assert losses["remote"] == losses["local"] and len(losses["local"]) == 8
        # Each of at most four train files and the validation file once, and five requests that failed.
        assert len(whole) <= 10


def test_rows_are_tokenized_from_the_store(bucket: Bucket, tmp_path: Path) -> None:
    tokenizer = save_chat_tokenizer(tmp_path / "tokenizer")
    for number in range(3):
        path = tmp_path / "data" / "train" / f"{number}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f'{{"text": "user {row} answer {number} and more"}}\n' for row in range(3000)))
    url = upload(tmp_path / "data", bucket, "data")
    found = {}
    for name, place in (("local", tmp_path / "data"), ("remote", url)):
        keys = {"type": "streaming", "train_folder": f"{place}/train", "tokenizer_path": str(tokenizer)}
        keys |= {"total_steps": 4, "shuffle_files": 2}  # type: ignore[dict-item]
        code, output, lines = train(tmp_path, keys, "--set", "model.vocab_size=2000", run=name)
        assert code == 0, output
        found[name] = [line["loss"] for line in lines]
    assert found["local"] == found["remote"] and len(found["local"]) == 4


def write_blend(root: Path) -> Path:
    """Tokenized files with names that URLs escape, a Megatron dataset, and rows."""
    draw = np.random.default_rng(0)
    for name in ("en/a b+c#1%20é?.bin", "en/b=1&2.bin", "c~n/a'.bin"):
        path = root / "web" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with TokenizedWriter(path) as writer:
            for length in draw.integers(2, 60, 700):
                writer.write(draw.integers(1, 60, length).tolist())
    with MegatronWriter(root / "books" / "b.bin", np.dtype("int32")) as megatron:
        for length in draw.integers(2, 60, 700):
            megatron.write(draw.integers(1, 60, length))
    (root / "rows").mkdir()
    lines = [f'{{"text": "row {number} of two and three{" more" * (number % 9)}"}}\n' for number in range(3000)]
    (root / "rows" / "r.jsonl").write_text("".join(lines))
    return root


def test_a_blend_with_a_schedule_resumes_on_other_numbers_of_ranks(bucket: Bucket, tmp_path: Path) -> None:
    root = write_blend(tmp_path / "data")
    url = upload(root, bucket, "data")
    for name in ("data/", "data/web/", "data/web/en/"):  # as consoles of object stores make folders
        bucket.client.put_object(Bucket=bucket.name, Key=name, Body=b"")
    tokenizer = str(save_chat_tokenizer(tmp_path / "tokenizer"))

    def run(name: str, place: object, world_size: int, steps: int, folder: str, **more: Any) -> list[dict[str, Any]]:
        books = {"name": "books", "type": "megatron", "weight": 0.3, "epochs_max": 1.5, "on_end": "drop"}
        blend = [
            {"path": f"{place}/web", "weight": [(0, 0.5), (200, 0.2)]},
            {"path": f"{place}/books/b", **books},
            {"path": f"{place}/rows", "type": "streaming", "weight": 0.2},
        ]
        keys = {"blend": blend, "tokenizer_path": tokenizer, "total_steps": steps, "num_worker": 1, **more}
        keys["micro_num"] = 2 // world_size
        text = f"data.update({keys!r})\nmodel['vocab_size'] = 600\nlr_scheduler['total_steps'] = 14\n"
        text += f"ckpt['save_ckpt_folder'] = {str(tmp_path / folder)!r}\n"
        arguments = ["--config", write_config(tmp_path / name, text), "--run-dir", tmp_path / name]
        ranks = start_ranks(arguments, tmp_path / name, world_size)
        assert [rank.wait() for rank in ranks] == [0] * world_size, ranks[0].output
        lines = metrics_of(tmp_path / name)
        return [
            # The epochs of rows are an estimate from the shards of the main rank.
            {
                key: line[key]
                for key in line
                if key.startswith(("loss", "source", "step")) and key != "source/rows/epochs"
            }
            for line in lines
            if "loss" in line
        ]

    local = run("local", root, 1, 14, "checkpoints_local")
    # 200 tokens are 6.25 samples of 32: from sample 7 on, web has 2/7 of the samples, books 3/7.
    expected = {"web": 0.5 * 7 + 2 / 7 * 21, "books": 0.3 * 7 + 3 / 7 * 21, "rows": 0.2 * 7 + 2 / 7 * 21}
    for name, samples in expected.items():
        assert abs(local[-1][f"source/{name}/tokens"] / 32 - samples) < 2
    cache = {"cache_folder": str(tmp_path / "cache"), "cache_bytes": 400_000}
    parts = run("one", url, 1, 4, "checkpoints", **cache)
    parts += run("two", url, 2, 9, "checkpoints", **cache)
    parts += run("three", url, 1, 14, "checkpoints", **cache)
    assert [line["step"] for line in parts] == list(range(1, 15))
    for ours, theirs in zip(parts, local, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)


def test_a_dry_run_fetches_one_train_file(bucket: Bucket, tmp_path: Path) -> None:
    url = upload(write_data(tmp_path / "data"), bucket, "data")
    code, output, _ = train(tmp_path, keys_of(url, cache_folder=str(tmp_path / "cache")), "--dry-run", run="dry")
    assert code == 0 and "the config is valid" in output, output
    assert fetched(tmp_path / "cache") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_folder": "s3://no-such-bucket/x"}, "there is no bucket 'no-such-bucket'"),
        ({"valid_folder": "{url}/vaild"}, "data/vaild: no file there; check the spelling of the URL"),
        ({"train_folder": "s5://bucket/x"}, "data.train_folder = 's5://bucket/x': .* unknown prefix"),
        ({"cache_bytes": 1000}, "more than data.cache_bytes = 1,000, and a file is fetched whole"),
    ],
)
def test_mistakes_are_named(bucket: Bucket, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    url = upload(write_data(tmp_path / "data"), bucket, "data")
    change = {name: value.replace("{url}", url) if isinstance(value, str) else value for name, value in change.items()}
    for options in (["--dry-run"], []):
        code, output, _ = train(tmp_path, keys_of(url) | change, *options, run=f"run{len(options)}")
        assert code == 2 and re.search(message, output), output
        assert "Traceback" not in output


def test_an_object_that_vanishes_during_a_run_ends_it(bucket: Bucket, tmp_path: Path) -> None:
    url = upload(write_data(tmp_path / "data"), bucket, "data")
    keys = keys_of(url, skip_bad_documents=True, shuffle_files=1, total_steps=400, num_worker=0)

    def remove() -> None:
        from internlm.data.remote import fetching

        download = fetching.download

        def vanish(path: Any, *given: Any) -> None:
            bucket.client.delete_object(Bucket=bucket.name, Key=path.url.removeprefix(f"{bucket.url}/"))
            download(path, *given)

        fetching.download = vanish

    config = write_config(tmp_path, f"data.update({keys!r})\n")
    command = start_training(["--config", config, "--run-dir", tmp_path / "run"], tmp_path / "out.txt", before=remove)
    assert command.wait() == 2
    assert "gone since the run listed its folder. Restore it, or start the run again" in command.output
    assert "skip_bad_documents" not in command.output and "Traceback" not in command.output
