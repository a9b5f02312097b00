"""Stores that are named wrongly or refuse access: the command ends at once, and says what to change."""

import pytest
from jobs import embed, errors

from nopad.cli import main
from nopad.embedding.inputs.sources import list_inputs
from nopad.storage import object_path, stores
from nopad.storage.addresses import Address
from nopad.storage.errors import UnusableStoreError, as_os_error
from nopad.storage.object_path import ObjectPath
from nopad.storage.stores import store_of

OUT = "s3://photos/tables/a"


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(object_path, "WAITS", (0.0, 0.0))


# Tables


def first_error(capsys, photos, out, model) -> tuple[int, str]:
    """The status of `nopad embed`, and its last line without the command that goes on."""
    status = main(["embed", str(photos), "--out", out, "--model", str(model)])
    return status, capsys.readouterr().err.splitlines()[-1].split("; finished shards are kept")[0]


def test_no_such_bucket(s3, photos, model, capsys):
    status, line = first_error(capsys, photos, "s3://photo/tables", model)
    assert status == 2
    assert line.endswith("s3://photo: no such bucket; create it, or correct its name")


def test_a_name_that_no_bucket_has(s3, photos, model, capsys):
    status, line = first_error(capsys, photos, "s3://my photos/tables", model)
    assert status == 2
    assert "s3://my photos: cannot be used: " in line
    assert "; check the bucket's name, AWS_ACCESS_KEY_ID, " in line


def test_no_credentials(s3, photos, model, capsys, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    stores._store.cache_clear()
    status, line = first_error(capsys, photos, OUT, model)
    assert status == 2
    assert "s3://photos: no credentials in the environment; check the bucket's name, AWS_ACCESS_KEY_ID, " in line


def test_a_bucket_that_is_read_only(s3, photos, model, capsys):
    s3.server.fail("", "status 403", method="PUT")
    status, line = first_error(capsys, photos, OUT, model)
    assert status == 2
    assert line.endswith(
        "s3://photos: 403 Forbidden: writing is refused; use credentials that may write there, or another --out"
    )


def test_another_region(s3, photos, model, capsys):
    for method in ("GET", "HEAD", "PUT"):
        s3.server.fail("", "status 301", method=method)
    status, line = first_error(capsys, photos, OUT, model)
    assert status == 2
    assert line.endswith("s3://photos: it is in another region; set AWS_REGION to that of the bucket")
    malformed = as_os_error(
        OSError("status code: 400 Bad Request: <Code>AuthorizationHeaderMalformed</Code>"), "s3://b"
    )
    assert malformed.strerror == "s3://b: it is in another region; set AWS_REGION to that of the bucket"


def test_credentials_that_are_refused(s3, photos, model, capsys):
    for method in ("GET", "HEAD", "PUT"):
        s3.server.fail("", "status 403", method=method)
    status, line = first_error(capsys, photos, OUT, model)
    assert status == 2
    assert "s3://photos: 403 Forbidden; check the bucket's name, AWS_ACCESS_KEY_ID, " in line


def test_credentials_that_have_expired():
    for code in ("ExpiredToken", "InvalidToken"):
        error = as_os_error(OSError(f"status code: 400 Bad Request: <Code>{code}</Code>"), "s3://b")
        assert isinstance(error, UnusableStoreError)
        assert str(error) == "s3://b: the credentials have expired, or are none; set new ones"


def test_what_is_refused_is_not_tried_again(s3):
    s3.server.fail("", "status 403", method="GET")
    s3.server.requests.clear()
    with pytest.raises(UnusableStoreError, match="s3://photos: 403 Forbidden"):
        ObjectPath(f"{OUT}/x").read_bytes()
    assert len(s3.server.requests) == 1


@pytest.mark.parametrize(
    "value", ["127.0.0.1:9", "nohost", "http://127.0.0.1:99999", "ftp://host", "http://", " http://h"]
)
def test_an_endpoint_that_is_no_address(s3, photos, model, capsys, monkeypatch, value):
    monkeypatch.setenv("AWS_ENDPOINT_URL", value)
    stores._store.cache_clear()
    status, line = first_error(capsys, photos, OUT, model)
    assert status == 2
    assert f"s3://photos: AWS_ENDPOINT_URL: expected the address of a server, got {value!r}; give http:// or" in line


@pytest.mark.parametrize("server", ["http://127.0.0.1:1", "http://nohost.invalid"])
def test_an_endpoint_where_nothing_answers(s3, photos, model, capsys, monkeypatch, server):
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    stores._store.cache_clear()
    status, line = first_error(capsys, photos, OUT, model)
    assert status == 2
    assert line.startswith(f"s3://photos: {server}: ")
    assert "AWS_REGION and AWS_ENDPOINT_URL" in line


def test_a_server_that_has_answered_and_is_gone_may_come_back(s3):
    refused = OSError('Generic { kind: Connect, message: "Connection refused" }')
    unknown = OSError(
        'kind: Connect, "dns error", error: "failed to lookup address information: Name or service not known"'
    )
    busy = OSError('kind: Connect, error: "failed to lookup address information: Temporary failure in name resolution"')
    for error, has_answered, is_unusable in [
        (refused, True, False),
        (refused, False, True),
        (unknown, True, False),
        (unknown, False, True),
        (busy, False, False),
    ]:
        found = as_os_error(error, "s3://b", has_answered=has_answered)
        assert isinstance(found, ConnectionError)
        assert isinstance(found, UnusableStoreError) == is_unusable
    assert ObjectPath(f"{OUT}/x").exists() is False
    assert store_of(Address.of(OUT), object_path.REQUEST_SECONDS)._has_answered


def test_keys_that_read_like_errors(s3):
    for key in ("NoSuchBucket", "latest/meta-data", "PermanentRedirect"):
        assert not ObjectPath(f"s3://photos/{key}").exists()


# Sources


def test_no_such_bucket_is_not_an_empty_one(s3):
    with pytest.raises(UnusableStoreError, match="s3://nobucket: no such bucket"):
        list_inputs(["s3://nobucket/a"])


@pytest.mark.parametrize(
    ("source", "environment", "faults", "message"),
    [
        ("s3://nobucket/a", {}, [], "s3://nobucket: no such bucket; create it, or correct its name"),
        ("s3://photos/a", {}, ["status 403"], "s3://photos: 403 Forbidden; check the bucket's name"),
        ("s3://photos/a", {}, ["status 301"], "s3://photos: it is in another region; set AWS_REGION"),
        (
            "s3://photos/a/x.png",
            {"ENDPOINT_URL": "http://127.0.0.1:1"},
            [],
            "s3://photos: http://127.0.0.1:1: Connection",
        ),
        ("s3://photos/a", {"ENDPOINT_URL": "127.0.0.1:1"}, [], "AWS_ENDPOINT_URL: expected the address of a server"),
        ("s3://photos/a", {"ACCESS_KEY_ID": "", "SECRET_ACCESS_KEY": ""}, [], "no credentials in the environment"),
        ("https://nohost.invalid/t.tar", {}, [], "https://nohost.invalid: failed to lookup address information: "),
        ("az://container/a", {}, [], "az://container: cannot be used: Generic MicrosoftAzure error: Account must be"),
    ],
)
def test_sources_that_cannot_be_used_end_the_command(
    s3, tmp_path, model, capsys, monkeypatch, source, environment, faults, message
):
    for name, value in environment.items():
        monkeypatch.setenv(f"AWS_{name}", value) if value else monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    stores._store.cache_clear()
    for kind in faults:
        for method in ("GET", "HEAD"):
            s3.server.fail("", kind, method=method)
    assert main(["embed", source, "--model", str(model), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("actors", [None, 1])
def test_a_shard_whose_inputs_are_all_refused_ends_the_job(s3, photos, tmp_path, model, actors):
    """Listing is allowed, reading is not, as policies of buckets have it."""
    s3.put_all(photos, "a/")
    s3.server.fail(".png", "status 403")
    s3.server.requests.clear()
    with pytest.raises(UnusableStoreError, match=r"000\.png of s3://photos/a: unreachable: s3://photos: 403 Forbidden"):
        embed("s3://photos/a", tmp_path / "out", model, actors=actors)
    requested = [line for line in s3.server.requests if "/00" in line and line.startswith("GET")]
    first = [line for line in requested if line.removesuffix(".png")[-1] in "01234"]
    assert len(first) == len(set(first)) == 5  # none was tried again; an actor may have begun the second shard again
    assert actors or len(requested) == len(set(requested))


@pytest.mark.parametrize("actors", [None, 1])
def test_a_failed_row_that_is_refused_does_not_keep_others_from_being_tried_again(s3, photos, tmp_path, model, actors):
    s3.put_all(photos, "a/")
    for name in ("001.png", "007.png"):  # of the first and of the second shard
        s3.put(f"a/{name}", b"no image")
    embed("s3://photos/a", tmp_path / "out", model)
    s3.put("a/007.png", (photos / "007.png").read_bytes())
    s3.server.fail("001.png", "status 403")
    summary = embed("s3://photos/a", tmp_path / "out", model, retry_failed=True, actors=actors)
    assert [*errors(tmp_path / "out")] == ["001.png"]
    assert [*summary.unmade.values()] == [
        "001.png of s3://photos/a: unreachable: s3://photos: 403 Forbidden; "
        "check the bucket's name, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL"
    ]


@pytest.mark.parametrize("name", ["t.parquet", "t.tar"])
def test_tables_and_tars_that_are_refused(s3, tmp_path, model, name):
    s3.put(name, b"1234")
    for method in ("GET", "HEAD"):
        s3.server.fail(name, "status 403", method=method)
    with pytest.raises(UnusableStoreError, match="s3://photos: 403 Forbidden; check"):
        embed(f"s3://photos/{name}", tmp_path / "out", model)
