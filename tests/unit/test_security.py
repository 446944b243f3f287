"""Who may ask: keys in a file, every route closed without one, and a host that others reach refused without keys."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from banjoray.errors import ConfigError
from banjoray.serving.security import (
    NONE,
    OPEN_PATHS,
    REREAD_S,
    Keys,
    add_key,
    hashed,
    is_loopback,
    key_in,
    parse_keys,
    revoke_key,
    settled_keys,
)
from endpoints import Plain, client, endpoint


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def owner(keys: Keys, key: str) -> str | None:
    return asyncio.run(keys.owner(key.encode()))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def test_a_key_is_long_random_and_kept_as_a_hash_that_only_the_owner_of_the_file_reads(file: Path) -> None:
    key, other = add_key(file, "alice"), add_key(file, "bob")
    text = file.read_text(encoding="utf-8")
    assert len(key) > 40
    assert key != other
    assert key not in text
    assert hashed(key.encode()).hex() in text
    assert file.stat().st_mode & 0o777 == 0o600
    assert yaml.safe_load(text) == {name: f"sha256:{found.hex()}" for name, found in parse_keys(text, "").items()}
    assert list(file.parent.iterdir()) == [file]


def test_a_key_opens_under_its_name_and_nothing_near_it_does(file: Path) -> None:
    key, other = add_key(file, "alice"), add_key(file, "bob")
    keys = Keys(str(file))
    assert (owner(keys, key), owner(keys, other)) == ("alice", "bob")
    for wrong in ("", key[:-1], key + "x", key.swapcase(), hashed(key.encode()).hex(), f"sha256:{hashed(b'').hex()}"):
        assert owner(keys, wrong) is None


def test_every_known_hash_is_compared_whichever_fits(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    first, *_ = [add_key(file, name) for name in ("a", "b", "c")]
    keys, compared = Keys(str(file)), []
    compare: Callable[[Any, Any], bool] = hmac.compare_digest

    def watched(left: bytes, right: bytes) -> bool:
        compared.append(right)
        return compare(left, right)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    for key in (first, "wrong"):
        compared.clear()
        owner(keys, key)
        assert len(compared) == 3


def test_a_new_line_lets_in_and_a_line_that_goes_shuts_out_while_the_endpoint_runs(file: Path) -> None:
    clock = Clock()
    old = add_key(file, "alice")
    keys = Keys(str(file), clock)
    new = add_key(file, "alice-2")
    assert owner(keys, new) is None
    clock.now += REREAD_S
    assert (owner(keys, new), owner(keys, old)) == ("alice-2", "alice")
    revoke_key(file, "alice")
    clock.now += REREAD_S
    assert (owner(keys, new), owner(keys, old)) == ("alice-2", None)


def test_a_file_that_breaks_changes_nothing_and_is_told_and_an_empty_one_shuts_all_out(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    key = add_key(file, "alice")
    keys = Keys(str(file), clock)
    good = file.read_text(encoding="utf-8")
    for broken in (lambda: file.unlink(), lambda: file.write_text("alice: secret-of-hers")):
        broken()
        clock.now += REREAD_S
        assert owner(keys, key) == "alice"
        assert "the keys stay as they were" in caplog.text
        assert "secret-of-hers" not in caplog.text
        caplog.clear()
    for text, found in ((good, "alice"), ("# nobody\n", None), (good, "alice")):
        file.write_text(text, encoding="utf-8")
        clock.now += REREAD_S
        assert owner(keys, key) == found


def test_comments_stay_where_a_key_is_added_and_revoked(file: Path) -> None:
    file.write_text("# ours\n\n", encoding="utf-8")
    add_key(file, "alice")
    add_key(file, "alice.2")
    revoke_key(file, "alice")
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["# ours", ""]
    assert [line.partition(":")[0] for line in lines[2:]] == ["alice.2"]


@pytest.mark.parametrize("line", ["bj_secret", "alice: bj_secret", "alice: sha256:00", "a b: sha256:" + "0" * 64])
def test_a_line_that_is_no_hash_is_refused_by_its_number_and_not_shown(file: Path, line: str) -> None:
    file.write_text(f"# keys\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"keys\.yaml line 2: needed NAME: sha256:HEX") as refused:
        Keys(str(file))
    assert "secret" not in str(refused.value)


def test_names_that_are_taken_missing_or_misspelt_are_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read as a file of keys"):
        revoke_key(file, "alice")
    add_key(file, "alice")
    with pytest.raises(ConfigError, match="'alice' has a key"):
        add_key(file, "alice")
    with pytest.raises(ConfigError, match="no key 'bob'; it has alice"):
        revoke_key(file, "bob")
    for name in ("", "a b", "ä", "a:b", "x" * 65, "-a", "a\n"):
        with pytest.raises(ConfigError, match="keys: found name"):
            add_key(file, name)
    with pytest.raises(ConfigError, match="a second time"):
        parse_keys(file.read_text(encoding="utf-8") * 2, "twice")


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([(b"authorization", b"Bearer abc")], b"abc"),
        ([(b"Authorization", b"bearer  abc ")], b"abc"),
        ([(b"x-api-key", b"abc")], b"abc"),
        ([(b"authorization", b"Basic eDp5"), (b"x-api-key", b"abc")], b"abc"),
        ([(b"authorization", b"Bearer first"), (b"authorization", b"Bearer second")], b"first"),
        ([(b"authorization", b"abc")], None),
        ([(b"authorization", b"Bearer")], b""),
        ([(b"cookie", b"key=abc")], None),
        ([], None),
    ],
)
def test_a_key_is_read_from_two_headers(headers: list[tuple[bytes, bytes]], key: bytes | None) -> None:
    assert key_in(headers) == key


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "127.0.0.1.example.org", "None")],
)
def test_a_host_that_others_reach_needs_keys_or_a_word_that_it_needs_none(host: str, alone: bool, file: Path) -> None:
    assert is_loopback(host) == alone
    if alone:
        assert settled_keys(None, host, "args") == NONE
    else:
        with pytest.raises(ConfigError, match=r"args\.api_keys: missing, .*banjoray keys new NAME.*api_keys: none"):
            settled_keys(None, host, "args")
    assert settled_keys(NONE, host, "args") == NONE
    with pytest.raises(ConfigError, match="can't be read as a file of keys"):
        settled_keys(str(file), host, "args")
    add_key(file, "alice")
    assert settled_keys(str(file), host, "args") == str(file)


def test_a_path_of_keys_means_the_same_for_a_replica_with_another_working_directory(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_key(file, "alice")
    monkeypatch.chdir(file.parent)
    assert settled_keys("keys.yaml", "0.0.0.0", "args") == str(file)
    url = "memory://secrets/keys.yaml"
    with fsspec.open(url, "wb") as there:
        there.write(file.read_bytes())
    assert settled_keys(url, "0.0.0.0", "args") == url


def test_a_cluster_has_to_be_told(file: Path) -> None:
    from banjoray.serving.app import build

    with pytest.raises(ConfigError, match=r"args\.api_keys: missing, and other machines can reach this cluster"):
        build({"model": "tiny@1", "registry": str(file.parent)})


def routes() -> list[tuple[str, str]]:
    from banjoray.serving.app import api

    documented = api.openapi()["paths"]
    found = [(method.upper(), path.replace("{name}", "tiny")) for path, told in documented.items() for method in told]
    return [*found, ("GET", "/docs"), ("GET", "/redoc"), ("GET", "/openapi.json"), ("OPTIONS", "/"), ("GET", "/other")]


def test_wrong_missing_and_revoked_keys_get_401_on_every_route_but_health(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, gone = add_key(file, "alice"), add_key(file, "bob")
    revoke_key(file, "bob")
    endpoint(monkeypatch, Plain(), api_keys=str(file))
    refused: list[dict[str, str]] = [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Bearer {gone}"},
        {"authorization": f"Basic {good}"},
        {"x-api-key": gone},
    ]

    async def scene() -> None:
        async with client() as http:
            for method, path in routes():
                opened = path in OPEN_PATHS
                for headers in refused:
                    response = await http.request(method, path, headers=headers, json={"inputs": "a"})
                    assert (response.status_code == 401) != opened, (method, path)
                    if not opened:
                        assert "error" in response.json()
                        assert response.headers["www-authenticate"].startswith("Bearer")
                for headers in ({"authorization": f"Bearer {good}"}, {"x-api-key": good}):
                    response = await http.request(method, path, headers=headers, json={"inputs": "a"})
                    assert response.status_code != 401, (method, path)

    asyncio.run(scene())


def test_no_answer_allows_another_site_to_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint(monkeypatch, Plain())
    asking = {"origin": "https://example.org", "access-control-request-method": "POST"}

    async def scene() -> None:
        async with client(headers=asking) as http:
            for response in (await http.options("/"), await http.post("/", json={"inputs": "a"})):
                assert [name for name in response.headers if name.startswith("access-control")] == []

    asyncio.run(scene())
