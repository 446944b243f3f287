"""Names, versions and aliases, on a local root and on a remote (in-memory) one alike.

Run as a script, this file is the other process of the race and kill tests.
"""

import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from fsspec.core import url_to_fs

import banjoray.registry
from banjoray.errors import BrokenVersion, RegistryError, StaleAlias
from banjoray.registry import MANIFEST, ModelVersion, Registry

WEIGHTS = bytes(range(256)) * 8
FILES = {
    "config.json": b'{"model_type": "bert"}\n',
    "extra/vocab.txt": b"a\nb\n",
    "job.yaml": b"task: text-classification\n",
    "model.safetensors": WEIGHTS,
}
LINEAGE: Mapping[str, str | int | None] = {"data": "3f2a", "base_model": "minilm", "revision": None, "trial": 4}
ROUNDS = 10


def measured(folder: Path) -> dict[str, float]:
    return {"accuracy": (folder / "model.safetensors").stat().st_size / 4096}


class Shelf(Registry):
    """A registry with a trained folder to register, a cache to fetch into, and a way past its back."""

    def __init__(self, root: str, folder: Path, cache: Path) -> None:
        super().__init__(root)
        self.folder, self.cache = folder, cache

    def add(
        self, model: str = "emotion", verify: Callable[[Path], Mapping[str, float]] = measured, count: int = 1
    ) -> ModelVersion:
        about: dict[str, Any] = {"task": "text-classification", "labels": ("joy", "anger"), "lineage": LINEAGE}
        return [self.register(model, self.folder, verify=verify, **about) for _ in range(count)][-1]

    def get(self, version: ModelVersion) -> Path:
        return self.fetch(version, into=self.cache)

    def numbers(self, model: str = "emotion") -> list[int]:
        return [version.version for version in self.versions(model)]

    def put(self, path: str, content: bytes) -> None:
        self._fs.makedirs(f"{self._path}/{path}".rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(f"{self._path}/{path}", content)

    def remove(self, path: str) -> None:
        self._fs.rm(f"{self._path}/{path}", recursive=True)

    def everything(self) -> dict[str, bytes]:
        paths = self._fs.find(self._path)
        return {path.removeprefix(f"{self._path}/"): self._fs.cat_file(path) for path in paths}


@pytest.fixture
def local(tmp_path: Path) -> Shelf:
    for path, content in FILES.items():
        (tmp_path / "trained" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "trained" / path).write_bytes(content)
    return Shelf(str(tmp_path / "registry"), tmp_path / "trained", tmp_path / "cache")


@pytest.fixture
def remote(local: Shelf, tmp_path: Path) -> Iterator[Shelf]:
    yield Shelf(f"memory://{tmp_path.name}", local.folder, local.cache)
    memory, path = url_to_fs(f"memory://{tmp_path.name}")
    if memory.exists(path):
        memory.rm(path, recursive=True)


@pytest.fixture(params=["local", "remote"])
def shelf(request: pytest.FixtureRequest, local: Shelf, remote: Shelf) -> Shelf:
    return local if request.param == "local" else remote


def test_a_fetched_version_is_the_folder_that_was_registered(shelf: Shelf) -> None:
    fetched = shelf.get(shelf.add())
    assert {path: (fetched / path).read_bytes() for path in FILES} == FILES


def test_a_version_says_what_was_registered_and_resolves_to_itself(shelf: Shelf) -> None:
    version = shelf.add()
    sha256 = {path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()}
    printed = "".join(f"{digest}  {path}\n" for path, digest in sha256.items())
    assert (str(version), version.model, version.version) == ("emotion@1", "emotion", 1)
    assert (version.task, version.labels, version.lineage) == ("text-classification", ("joy", "anger"), LINEAGE)
    assert (version.metrics, version.files) == ({"accuracy": 0.5}, sha256)
    assert version.digest == hashlib.sha256(printed.encode()).hexdigest()
    assert version.created.endswith("+00:00")
    assert shelf.resolve("emotion@1") == version


def test_the_manifest_starts_with_its_schema_and_leaves_out_where_it_lies(shelf: Shelf) -> None:
    version = shelf.add()
    text = shelf.everything()[f"emotion/1/{MANIFEST}"].decode()
    assert text.startswith('{\n  "schema": 1,\n')
    assert text.endswith("}\n")
    assert "location" not in json.loads(text)
    assert {**json.loads(text), "location": version.location} == {"schema": 1, **version.to_json()}


def test_the_location_is_an_absolute_path_or_a_url(local: Shelf, remote: Shelf, tmp_path: Path) -> None:
    assert local.add().location == f"{tmp_path}/registry/emotion/1"
    assert re.fullmatch(rf"memory:/+{tmp_path.name}/emotion/1", remote.add().location)


def test_verify_scores_the_registered_files_before_there_is_a_version(shelf: Shelf) -> None:
    def verify(staged: Path) -> dict[str, float]:
        assert staged != shelf.folder
        assert (staged / "model.safetensors").read_bytes() == WEIGHTS
        assert shelf.models() == []
        with pytest.raises(RegistryError, match="no model 'emotion'"):
            shelf.resolve("emotion@1")
        return measured(staged)

    shelf.add(verify=verify)
    assert shelf.models() == ["emotion"]


def test_a_failed_verify_leaves_nothing_readable_and_its_number_unused(shelf: Shelf) -> None:
    def verify(staged: Path) -> dict[str, float]:
        raise ZeroDivisionError(f"no rows to score {staged.name} on")

    with pytest.raises(ZeroDivisionError, match="no rows to score"):
        shelf.add(verify=verify)
    assert list(shelf.everything()) == ["emotion/claims/1"]
    assert shelf.add().version == 2
    assert shelf.numbers() == [2]


@pytest.mark.parametrize(
    ("written", "score", "error"),
    [("", float("nan"), r"emotion@1: verify measured \{'loss': nan\}"), ("{}", 1.0, r"emotion@1: .*config\.json")],
)
def test_a_verify_that_scores_no_number_or_changes_a_file_is_refused(
    shelf: Shelf, written: str, score: float, error: str
) -> None:
    def verify(staged: Path) -> dict[str, float]:
        (staged / "config.json").write_text(written or (staged / "config.json").read_text())
        return {"loss": score}

    with pytest.raises(RegistryError, match=error):
        shelf.add(verify=verify)
    assert shelf.models() == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "a.pth", "optimizer.PKL", "extra/last.ckpt"])
def test_pickled_weights_are_refused(shelf: Shelf, name: str) -> None:
    (shelf.folder / name).write_bytes(b"\x80\x04.")
    with pytest.raises(RegistryError, match=rf"found '{re.escape(name)}', needed safetensors only"):
        shelf.add()
    assert shelf.everything() == {}


def test_a_folder_without_files_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    shelf.folder = tmp_path / "nowhere"
    with pytest.raises(RegistryError, match="nowhere: found no files"):
        shelf.add()


def test_registering_again_gives_another_number_and_never_touches_the_first(shelf: Shelf) -> None:
    shelf.add()
    first = shelf.everything()
    (shelf.folder / "model.safetensors").write_bytes(WEIGHTS * 2)
    assert shelf.add().version == 2
    shelf.promote("emotion", 2, "production")
    assert first.items() <= shelf.everything().items()


def test_registering_while_another_registers_gives_two_numbers(shelf: Shelf) -> None:
    inner: list[int] = []

    def verify(staged: Path) -> dict[str, float]:
        inner.append(shelf.add().version)
        return measured(staged)

    assert [shelf.add(verify=verify).version, *inner] == [1, 2]
    assert shelf.numbers() == [1, 2]


def test_a_number_is_not_given_out_again_when_its_version_is_deleted(shelf: Shelf) -> None:
    shelf.add()
    shelf.remove("emotion/1")
    assert shelf.add().version == 2


def test_a_number_that_is_taken_between_looking_and_claiming_is_passed_over(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.put("emotion/claims/1", b"emotion@1\n")
    monkeypatch.setattr(shelf, "_numbered", lambda _path: [])
    assert shelf.add().version == 2


def test_a_fetched_version_can_be_registered_elsewhere(local: Shelf, remote: Shelf) -> None:
    version = local.add()
    remote.folder = local.get(version)
    assert remote.add().files == version.files


def test_a_place_that_cannot_be_written_says_so(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    monkeypatch.setattr(shelf._fs, "pipe_file", refuse)
    with pytest.raises(RegistryError, match="Operation not supported; needed to create files"):
        shelf.add()


def test_a_version_survives_json_and_pickle_and_can_be_compared_and_hashed(shelf: Shelf) -> None:
    version = shelf.add()
    assert ModelVersion.from_json(json.loads(json.dumps(version.to_json()))) == version
    assert pickle.loads(pickle.dumps(version)) == version
    assert {version, shelf.resolve("emotion")} == {version}
    with pytest.raises(FrozenInstanceError):
        version.version = 2  # type: ignore[misc]


def test_promote_returns_the_number_that_the_alias_held(shelf: Shelf) -> None:
    shelf.add(count=3)
    assert shelf.promote("emotion", 1, "production", expected=None) is None
    assert shelf.promote("emotion", 3, "production") == 1
    assert shelf.promote("emotion", 2, "production", expected=3) == 3
    assert shelf.aliases("emotion") == {"production": 2}


def test_promote_with_another_number_than_expected_changes_nothing_and_says_both(shelf: Shelf) -> None:
    shelf.add(count=2)
    shelf.promote("emotion", 1, "production")
    before = shelf.everything()
    with pytest.raises(StaleAlias, match="emotion@production: found 1, needed 2"):
        shelf.promote("emotion", 2, "production", expected=2)
    with pytest.raises(StaleAlias, match="found 1, needed nothing"):
        shelf.promote("emotion", 2, "production", expected=None)
    with pytest.raises(StaleAlias, match="found nothing, needed 1"):
        shelf.promote("emotion", 2, "canary", expected=1)
    assert shelf.everything() == before


def test_a_promote_that_comes_between_looking_and_moving_is_seen(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.add(count=3)
    shelf.promote("emotion", 1, "production")
    look = shelf._held

    def late(model: str, alias: str) -> tuple[int, int | None]:
        seen = look(model, alias)
        monkeypatch.undo()
        Registry(shelf.root).promote(model, 3, alias)
        return seen

    monkeypatch.setattr(shelf, "_held", late)
    with pytest.raises(StaleAlias, match="found 3, needed 1"):
        shelf.promote("emotion", 2, "production", expected=1)
    monkeypatch.setattr(shelf, "_held", late)
    assert shelf.promote("emotion", 2, "production") == 3
    assert shelf.aliases("emotion") == {"production": 2}


def test_a_move_that_was_cut_off_while_it_was_written_is_no_move(shelf: Shelf) -> None:
    shelf.add()
    shelf.promote("emotion", 1, "production")
    shelf.put(f"emotion/aliases/production/{MANIFEST}.5f0c", b"")
    assert shelf.resolve("emotion@production").version == 1
    assert shelf.promote("emotion", 1, "production", expected=1) == 1


def test_a_reference_is_a_number_an_alias_or_a_bare_name(shelf: Shelf) -> None:
    shelf.add(count=11)
    assert shelf.resolve("emotion").version == 11
    shelf.promote("emotion", 2, "production")
    shelf.promote("emotion", 3, "canary")
    asked = ("emotion", "emotion@production", "emotion@canary", "emotion@10")
    assert [shelf.resolve(reference).version for reference in asked] == [2, 2, 3, 10]


def test_models_versions_and_aliases_are_listed_in_order(shelf: Shelf) -> None:
    assert shelf.models() == []
    shelf.add("zebra")
    shelf.add("emotion", count=10)
    shelf.promote("emotion", 2, "production")
    shelf.promote("emotion", 1, "canary")
    assert shelf.models() == ["emotion", "zebra"]
    assert shelf.numbers() == list(range(1, 11))
    assert list(shelf.aliases("emotion").items()) == [("canary", 1), ("production", 2)]
    assert shelf.aliases("zebra") == {}


def test_a_numbered_folder_without_a_manifest_is_not_a_version(shelf: Shelf) -> None:
    shelf.add()
    for path in ("emotion/7/model.safetensors", "half/1/model.safetensors", "README.md"):
        shelf.put(path, WEIGHTS)
    assert shelf.models() == ["emotion"]
    assert shelf.numbers() == [1]
    assert shelf.resolve("emotion").version == 1
    with pytest.raises(RegistryError, match="no version 7; it has 1"):
        shelf.resolve("emotion@7")
    assert shelf.add().version == 8


def test_an_unknown_model_lists_the_models_and_the_nearest_name(shelf: Shelf) -> None:
    with pytest.raises(RegistryError, match="no model 'emotoin'; it has none"):
        shelf.resolve("emotoin@production")
    shelf.add("emotion")
    shelf.add("topics")
    asks: list[Callable[[], object]] = [
        lambda: shelf.resolve("emotoin"),
        lambda: shelf.versions("emotoin"),
        lambda: shelf.promote("emotoin", 1, "production"),
    ]
    for ask in asks:
        with pytest.raises(RegistryError, match=r"no model 'emotoin'; it has 'emotion', 'topics'\. .* 'emotion'\?"):
            ask()


def test_an_unknown_version_or_alias_lists_what_there_is(shelf: Shelf) -> None:
    shelf.add(count=2)
    shelf.promote("emotion", 1, "canary")
    with pytest.raises(RegistryError, match="no version 9; it has 1, 2"):
        shelf.resolve("emotion@9")
    with pytest.raises(RegistryError, match="no version 9; it has 1, 2"):
        shelf.promote("emotion", 9, "canary")
    with pytest.raises(RegistryError, match="no alias 'production'; emotion has 'canary'"):
        shelf.resolve("emotion@production")
    assert shelf.aliases("emotion") == {"canary": 1}


@pytest.mark.parametrize("reference", ["", "@", "a@", "@7", "a@b@c", "../a", "a/b@1", "a@../2", ".a", "a\n", "é"])
def test_a_malformed_reference_is_refused_with_what_is_needed(local: Shelf, reference: str) -> None:
    with pytest.raises(RegistryError, match="needed name, name@number or name@alias") as refused:
        local.resolve(reference)
    assert repr(reference) in str(refused.value)


@pytest.mark.parametrize("alias", ["", "7", "a/b", "../x", "pro@duction", ".lock"])
def test_an_alias_that_reads_as_a_number_or_a_path_is_refused(local: Shelf, alias: str) -> None:
    local.add()
    with pytest.raises(RegistryError, match=r"alias .* needed a name"):
        local.promote("emotion", 1, alias)


def test_a_model_name_that_reads_as_a_path_is_refused_everywhere(shelf: Shelf) -> None:
    asks: list[Callable[[str], object]] = [shelf.add, shelf.versions, shelf.aliases]
    asks.append(lambda name: shelf.promote(name, 1, "production"))
    for ask in asks:
        with pytest.raises(RegistryError, match=r"model '\.\./up': needed a name"):
            ask("../up")
    assert shelf.everything() == {}


def test_a_local_version_is_fetched_without_a_copy(local: Shelf) -> None:
    version = local.add()
    assert local.get(version) == Path(version.location)
    assert not local.cache.exists()


def test_a_remote_version_is_downloaded_once_to_a_folder_named_by_its_digest(remote: Shelf) -> None:
    version = remote.add()
    assert remote.get(version) == remote.cache / version.digest
    remote.remove("emotion")
    assert remote.get(version) == remote.cache / version.digest
    assert list(remote.cache.iterdir()) == [remote.cache / version.digest]


def test_the_cache_is_in_the_home_folder_unless_told(remote: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(remote.cache))
    version = remote.add()
    assert remote.fetch(version) == remote.cache / ".cache/banjoray/versions" / version.digest


def test_a_folder_that_another_process_cached_in_the_meantime_is_used(
    remote: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, download = remote.add(), remote._download

    def slow(source: str, target: Path, files: Mapping[str, str]) -> Path:
        Registry(remote.root).fetch(version, into=remote.cache)
        return download(source, target, files)

    monkeypatch.setattr(remote, "_download", slow)
    assert remote.get(version) == remote.cache / version.digest
    assert list(remote.cache.iterdir()) == [remote.cache / version.digest]


@pytest.mark.parametrize("content", [WEIGHTS[:-1] + b"?", None], ids=["changed byte", "missing file"])
def test_a_changed_or_missing_file_is_a_broken_version_that_names_it(shelf: Shelf, content: bytes | None) -> None:
    version = shelf.add()
    shelf.remove("emotion/1/model.safetensors")
    if content:
        shelf.put("emotion/1/model.safetensors", content)
    found = f"sha256 {hashlib.sha256(content).hexdigest()[:12]}" if content else "no file"
    needed = f"sha256 {hashlib.sha256(WEIGHTS).hexdigest()[:12]}"
    with pytest.raises(BrokenVersion, match=rf"emotion@1.*model\.safetensors: found {found}, needed {needed}"):
        shelf.get(version)
    assert not (shelf.cache / version.digest).exists()


def test_a_file_that_was_slipped_into_a_version_or_its_cache_breaks_it(shelf: Shelf) -> None:
    version = shelf.add()
    (shelf.get(version) / "adapter_config.json").write_text("{}")
    with pytest.raises(BrokenVersion, match=r"adapter_config\.json: found sha256 .*, needed no file"):
        shelf.get(version)


def escape(path: str) -> dict[str, object]:
    return {"files": {path: "0"}, "digest": hashlib.sha256(f"0  {path}\n".encode()).hexdigest()}


EDITS = [{"schema": 2}, {"version": 2}, {"digest": "0"}, {"files": {}}, {"more": 1}, {"files": None}, "torn"]


@pytest.mark.parametrize("edit", [*EDITS, escape("a/../../up"), escape("/up"), escape("//up")], ids=str)
def test_an_edited_or_torn_manifest_is_a_broken_version(shelf: Shelf, edit: dict[str, object] | str) -> None:
    shelf.add()
    manifest = json.loads(shelf.everything()[f"emotion/1/{MANIFEST}"])
    text = json.dumps(manifest)[:40] if isinstance(edit, str) else json.dumps({**manifest, **edit})
    shelf.put(f"emotion/1/{MANIFEST}", text.encode())
    for ask in (shelf.resolve, shelf.versions):
        with pytest.raises(BrokenVersion, match=r"emotion/1/banjoray\.json: not a manifest"):
            ask("emotion")


def test_errors_and_the_registry_itself_survive_pickling(shelf: Shelf) -> None:
    shelf.add()
    with pytest.raises(StaleAlias) as raised:
        shelf.promote("emotion", 1, "production", expected=4)
    for error in (raised.value, RegistryError("no model"), BrokenVersion("changed")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy)) == (type(error), str(error))
    assert pickle.loads(pickle.dumps(shelf)).models() == ["emotion"]


def start(role: str, shelf: Shelf) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", __file__, role, shelf.root, str(shelf.folder)]
    env = {**os.environ, "PYTHONPATH": str(Path(banjoray.registry.__file__).parents[1])}
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask_together(processes: list[subprocess.Popen[str]], lines: list[str]) -> list[str]:
    """One answer of each process; all of them wait for their line when the first line is written."""
    for process, line in zip(processes, lines, strict=True):
        assert process.stdin is not None
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
    return [process.stdout.readline().strip() for process in processes if process.stdout is not None]


def test_of_two_processes_that_promote_at_once_one_wins_and_the_other_gets_a_stale_alias(local: Shelf) -> None:
    local.add(count=3)
    local.promote("emotion", 1, "production")
    with ExitStack() as stack:
        racers = [stack.enter_context(start("promote", local)) for _ in range(2)]
        # The first answer says that both have started; both lose, so the alias stays at 1.
        assert all(answer.startswith("StaleAlias") for answer in ask_together(racers, ["2 3", "2 3"]))
        for _ in range(ROUNDS):
            answers = ask_together(racers, ["2 1", "3 1"])
            winner = answers.index("moved from 1")
            held = (2, 3)[winner]
            assert answers[1 - winner].startswith(f"StaleAlias emotion@production: found {held}, needed 1")
            assert local.promote("emotion", 1, "production", expected=held) == held


def test_processes_that_register_at_once_get_a_number_each(local: Shelf) -> None:
    with ExitStack() as stack:
        racers = [stack.enter_context(start("register", local)) for _ in range(2)]
        numbers = [int(answer) for _ in range(ROUNDS) for answer in ask_together(racers, ["", ""])]
    assert sorted(numbers) == list(range(1, 2 * ROUNDS + 1))
    assert local.numbers() == sorted(numbers)


def test_a_process_killed_in_verify_leaves_no_version_and_the_next_one_registers(local: Shelf) -> None:
    with start("die", local) as process:
        process.communicate("register\n")
    assert process.returncode == -signal.SIGKILL
    assert (Path(local.root) / "emotion/1/model.safetensors").exists()
    assert local.models() == []
    assert local.add().version == 2
    assert local.numbers() == [2]


def killed(_: Path) -> dict[str, float]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def answer(role: str, shelf: Shelf, line: str) -> str:
    if role != "promote":
        return str(shelf.add(verify=killed if role == "die" else measured).version)
    version, expected = map(int, line.split())
    try:
        return f"moved from {shelf.promote('emotion', version, 'production', expected=expected)}"
    except StaleAlias as error:
        return f"StaleAlias {error}"


if __name__ == "__main__":
    for asked in sys.stdin:
        sys.stdout.write(answer(sys.argv[1], Shelf(sys.argv[2], Path(sys.argv[3]), Path()), asked) + "\n")
        sys.stdout.flush()
