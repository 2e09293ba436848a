"""How URLs are read: which store, bucket, key and endpoint each spelling means."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.utils.errors import ConfigError
from internlm.utils.storage import storage_path
from internlm.utils.storage.s3 import S3Store
from internlm.utils.storage.urls import locate

# Spelling, then the request that a client makes for it.
REQUESTS = {
    "s3://s3-runs/a/b": "https://s3-runs.s3.amazonaws.com/a/b",
    "boto3:s3://bucket/a/b": "https://bucket.s3.amazonaws.com/a/b",
    "boto3:s3://bucket.10.0.0.1/a/b": "http://10.0.0.1/bucket/a/b",
    "boto3:s3://bucket.10.0.0.1:9000/a/b": "http://10.0.0.1:9000/bucket/a/b",
    "boto3:s3://3s.minio.example.org:9000/a/b": "http://minio.example.org:9000/3s/a/b",
    "boto3:s3://bucket.store.example.org/a/b": "https://store.example.org/bucket/a/b",
    "s3://bucket.10.0.0.1/a/b": "http://10.0.0.1/bucket/a/b",
    "volc:vc://vc-runs.tos-cn-beijing.volces.com/a/b": "https://vc-runs.tos-s3-cn-beijing.volces.com/a/b",
    "vc://bucket.tos-s3-cn-beijing.volces.com/a/b": "https://bucket.tos-s3-cn-beijing.volces.com/a/b",
    "volc:vc://bucket.tos-ap-southeast-1.bytepluses.com/a/b": "https://bucket.tos-s3-ap-southeast-1.bytepluses.com/a/b",
    "oss2:ali://ali-runs.oss-cn-hangzhou.aliyuncs.com/a/b": "https://ali-runs.s3.oss-cn-hangzhou.aliyuncs.com/a/b",
    "ali://bucket.oss-cn-x-internal.aliyuncs.com/a/b": "https://bucket.s3.oss-cn-x-internal.aliyuncs.com/a/b",
    "oss://bucket/a/b": "https://bucket.s3.oss-cn-hangzhou.aliyuncs.com/a/b",
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("OSS_ENDPOINT", "oss-cn-hangzhou.aliyuncs.com")
    monkeypatch.setenv("ACCESS_KEY", "key")
    monkeypatch.setenv("SECRET_ACCESS_KEY", "secret")


@pytest.mark.parametrize(("url", "request_url"), REQUESTS.items())
def test_each_spelling_leads_to_its_endpoint_and_bucket(url: str, request_url: str) -> None:
    path = storage_path(url)
    store = locate(path.url).open_store()
    assert isinstance(store, S3Store)
    parameters = {"Bucket": store.bucket, "Key": locate(path.url).key}
    signed = store.client.generate_presigned_url("get_object", Params=parameters)
    assert signed.partition("?")[0] == request_url
    assert str(path) == url
    assert (path.name, str(path.parent / "c")) == ("b", url[:-1] + "c")
    assert not path.is_local


def test_tos_is_asked_with_its_region_and_oss_with_the_older_signature() -> None:
    def signed(url: str) -> str:
        store = locate(url).open_store()
        assert isinstance(store, S3Store)
        return store.client.generate_presigned_url("get_object", Params={"Bucket": store.bucket, "Key": "key"})

    assert "%2Fcn-beijing%2Fs3%2F" in signed("volc:vc://bucket.tos-cn-beijing.volces.com/key")
    assert "&Signature=" in signed("oss2:ali://bucket.oss-cn-hangzhou.aliyuncs.com/key")


BUCKETS = st.from_regex(r"[s3vcali:/boto0-9-]{3,20}", fullmatch=True).map(
    lambda text: text.translate({58: "x", 47: "y"})
)


@given(BUCKETS, st.lists(st.from_regex(r"[s3a-z0-9_.:@+-]{1,8}", fullmatch=True), min_size=1, max_size=4))
def test_no_letter_of_a_bucket_or_key_is_lost(bucket: str, parts: list[str]) -> None:
    for root in (f"s3://{bucket}", f"gs://{bucket}", f"boto3:s3://{bucket}.10.0.0.1", f"ali://{bucket}.x.com"):
        location = locate("/".join([root, *parts]))
        assert location.address.bucket == bucket  # type: ignore[attr-defined]
        assert location.key == "/".join(parts)
        assert location.url_of(location.key) == "/".join([root, *parts])


@pytest.mark.parametrize("url", ["/a/b", "local:/a/b", "/a/b/", "local:/a//b"])
def test_local_spellings_are_one_path(url: str) -> None:
    path = storage_path(url)
    assert path == storage_path("/a/b") and str(path) == "/a/b"
    assert path.is_local and path.local == Path("/a/b")
    assert str(path.parent.parent.parent) == "/"
    assert storage_path(Path("/a/b")) == storage_path(path) == path


def test_a_relative_path_stays_relative() -> None:
    assert str(storage_path("runs/demo") / "100") == "runs/demo/100"
    assert str(storage_path(".") / "100") == "100"
    assert str(storage_path("local:runs").parent) == "."


@pytest.mark.parametrize("root", ["s3://bucket", "boto3:s3://bucket.10.0.0.1", "gs://bucket", "memory://"])
def test_the_root_of_a_store_is_its_own_parent(root: str) -> None:
    # `locate` alone: this needs no package.
    assert locate(root).key == ""
    assert locate(locate(root).url_of("a/b")).key == "a/b"
    assert locate(root).url_of("") == root


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hdfs://host/a", r"'hdfs://host/a' has an unknown prefix.* Known are: .*s3://bucket/key.*'./hdfs://host/a'"),
        ("s3:/bucket/a", "has an unknown prefix. Did you mean 's3://'?"),
        ("s3:bucket", "Did you mean 's3://'"),
        ("s3://", "has an unknown prefix"),
        ("boto:s3://bucket.10.0.0.1/a", "Did you mean 'boto3:s3://'"),
        ("volc:vc://bucket/a", "'volc:vc://bucket/a' has no endpoint; write it after .*'bucket.tos-cn-beijing"),
        ("oss2:ali://bucket/a", "has no endpoint; write it after .*'bucket.oss-cn-hangzhou"),
        ("", "a path is empty"),
        ("local:", "a path is empty"),
    ],
)
def test_a_url_that_cannot_be_read_is_named_with_what_can(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        storage_path(url)


def test_oss_without_an_endpoint_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OSS_ENDPOINT")
    with pytest.raises(ConfigError, match="set OSS_ENDPOINT in the environment"):
        storage_path("oss://another-bucket/a")


def test_half_of_a_pair_of_credentials_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match="SECRET_ACCESS_KEY is not set, but ACCESS_KEY and SECRET_ACCESS_KEY"):
        storage_path("s3://bucket/a")


@pytest.mark.parametrize(
    ("variable", "text"), [("INTERNLM_STORAGE_RETRY_SECONDS", "soon"), ("INTERNLM_STORAGE_TIMEOUT_SECONDS", "-1")]
)
def test_a_time_that_is_no_number_of_seconds_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigError, match=f"the environment variable {variable} is '{text}'; set it to a number"):
        storage_path("s3://bucket/a")


@pytest.mark.parametrize(
    ("url", "module", "fix"),
    [
        ("s3://no-package/a", "boto3", r"need the package boto3: pip install 'internlm\[s3\]'"),
        ("gs://no-package/a", "gcsfs", r"'gs://' needs a package.*pip install 'internlm\[gcs\]'"),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, url: str, module: str, fix: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("ACCESS_KEY", "a-key-that-no-client-was-made-for")
    with pytest.raises(ConfigError, match=fix):
        storage_path(url)
