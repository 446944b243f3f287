"""Name -> immutable versions -> aliases, as folders that ``from_pretrained`` reads, on a disk or any fsspec URL.

    <root>/emotion/7/                      a plain Hugging Face folder, weights as safetensors only
    <root>/emotion/7/banjoray.json         the manifest, written last: a folder without it is not a version
    <root>/emotion/claims/7                number 7 was given out, and never will be again
    <root>/emotion/aliases/production/3    the third move of this alias; the highest one says where it points

Everything rests on one step: create a file whole, or learn that it was there. Who creates claim 7 has number 7; who
creates move 4 has moved the alias from where move 3 left it. There are no locks, so a killed process leaves none.
The step is atomic on local file systems with hard links (disks, NFS), and on AWS S3, Google Cloud Storage and Azure,
where ``pipe_file(mode="create")`` is one conditional request. Other fsspec file systems look first and write then:
there, let one process write at a time.
"""

import difflib
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from banjoray.errors import BrokenVersion, RegistryError, StaleAlias

MANIFEST = "banjoray.json"
SCHEMA = 1
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NAMES = "where a name is 1 to 128 letters, digits, '.', '_' or '-', the first a letter or digit"
NUMBER = re.compile(r"[1-9][0-9]*")
Lineage = Mapping[str, str | int | None]
Expected = int | Literal["anything"] | None
Verify = Callable[[Path], Mapping[str, float]]


@dataclass(frozen=True)
class ModelVersion:
    """One registered version: what its files are, what they scored, and where they came from.

    ``files`` is path inside the folder -> sha256; ``digest`` is the sha256 of what ``sha256sum`` prints for them in
    the order of their paths; ``created`` is UTC, ISO 8601; ``location`` is a path or URL, and not in the manifest.
    """

    model: str
    version: int
    task: str
    labels: tuple[str, ...]
    metrics: Mapping[str, float] = field(hash=False)
    lineage: Lineage = field(hash=False)
    files: Mapping[str, str] = field(hash=False)
    created: str
    digest: str
    location: str

    def __str__(self) -> str:
        """``emotion@7``, which ``resolve`` reads."""
        return f"{self.model}@{self.version}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, in the order of the fields."""
        return {**asdict(self), "labels": list(self.labels)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The version that ``to_json`` wrote; KeyError or TypeError where a key is missing or unknown."""
        return cls(**{**data, "labels": tuple(data["labels"])})


class Registry:
    """The models under one root; each call reads what is there now."""

    def __init__(self, root: str) -> None:
        """``root`` is a local path, or the URL of any fsspec file system that is installed."""
        try:
            self._fs, path = url_to_fs(root)
        except (ImportError, ValueError) as error:
            raise RegistryError(f"registry {root!r}: fsspec can't open it here ({error}).") from None
        self._path = path.rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)
        self.root = self._url(self._path)

    def register(
        self, model: str, folder: Path, *, task: str, labels: tuple[str, ...], lineage: Lineage, verify: Verify
    ) -> ModelVersion:
        """The next version of ``model``, a copy of ``folder`` that ``verify`` has loaded and scored.

        ``verify`` gets a local folder with what the registry now holds (read back from a remote root), must leave
        it as it is, and returns the metrics that the manifest records. Where it raises, the error comes through,
        the staged files are gone and no version has the number. A manifest in ``folder`` is not copied, so that a
        fetched version can be registered elsewhere.
        """
        _require_name(model, "model")
        files = _loadable(folder)
        number = self._claim(model)
        target = f"{self._path}/{model}/{number}"
        try:
            self._upload(folder, target, files)
            with tempfile.TemporaryDirectory(prefix="banjoray-") as scratch:
                staged = Path(target) if self._local else self._download(target, Path(scratch), files)
                metrics = {name: float(score) for name, score in verify(staged).items()}
                # After verify, so that the one check also finds what verify itself changed.
                _compare(f"{model}@{number}", staged, files)
            if not all(map(math.isfinite, metrics.values())):
                raise RegistryError(f"{model}@{number}: verify measured {metrics}, needed finite numbers. Train again.")
            created, digest = datetime.now(UTC).isoformat(timespec="seconds"), _digest_of(files)
            version = ModelVersion(
                model, number, task, tuple(labels), metrics, dict(lineage), files, created, digest, self._url(target)
            )
            manifest = {"schema": SCHEMA} | version.to_json()
            del manifest["location"]
            self._create(f"{target}/{MANIFEST}", json.dumps(manifest, indent=2, ensure_ascii=False))
        except BaseException:
            # What can't be removed does no harm: without a manifest it is not a version.
            with suppress(OSError):
                self._fs.rm(target, recursive=True)
            raise
        return version

    def promote(self, model: str, version: int, alias: str, expected: Expected = "anything") -> int | None:
        """The number that ``alias`` held before it was pointed at ``version``; None where there was no alias.

        Compare-and-swap: with ``expected`` a number, or None for "no such alias yet", an alias that holds something
        else stays as it is and StaleAlias is raised.
        """
        _require_name(alias, "alias")
        self._manifest(model, version)
        while True:
            moves, held = self._held(model, alias)
            if expected not in ("anything", held):
                raise StaleAlias(
                    f"{model}@{alias}: found {held or 'nothing'}, needed {expected or 'nothing'}; it stays. "
                    f"Look at what it holds, then promote with expected={held}."
                )
            # Where another process made this move first, look again at what the alias holds.
            if self._create(f"{self._path}/{model}/aliases/{alias}/{moves + 1}", str(version)):
                return held

    def resolve(self, reference: str) -> ModelVersion:
        """The version that ``name@number``, ``name@alias`` or ``name`` (its alias production, else newest) means."""
        model, at, which = reference.partition("@")
        if not NAME.fullmatch(model) or (at and not NAME.fullmatch(which)):
            raise RegistryError(f"reference {reference!r}: needed name, name@number or name@alias, {NAMES}.")
        number = int(which) if which.isdigit() else self._held(model, which or "production")[1]
        if number is None:
            number = self._known_numbers(model)[-1]
            if which:
                raise RegistryError(f"{reference}: no alias {which!r}; {model} has {_listed(self.aliases(model))}.")
        return self._manifest(model, number)

    def models(self) -> list[str]:
        """The names that have a version, sorted."""
        return sorted(name for name in self._names(self._path) if NAME.fullmatch(name) and self._numbers(name))

    def versions(self, model: str) -> list[ModelVersion]:
        """Every version of ``model``, oldest first; RegistryError where it has none."""
        _require_name(model, "model")
        return [self._manifest(model, number) for number in self._known_numbers(model)]

    def aliases(self, model: str) -> dict[str, int]:
        """Alias -> the number it holds, sorted by alias; empty where nothing was promoted."""
        _require_name(model, "model")
        names = [name for name in self._names(f"{self._path}/{model}/aliases") if NAME.fullmatch(name)]
        return {alias: held for alias in sorted(names) if (held := self._held(model, alias)[1]) is not None}

    def fetch(self, version: ModelVersion, into: Path | None = None) -> Path:
        """A local folder with exactly the files of ``version``, each checked against its sha256.

        A local root gives its own folder. A remote one downloads to ``into/<digest>``, which is there complete or
        not at all (``into`` is ``~/.cache/banjoray/versions`` if not given). BrokenVersion names the first file
        that is missing, changed or extra.
        """
        source = f"{self._path}/{version.model}/{version.version}"
        cache = into or Path.home() / ".cache" / "banjoray" / "versions"
        kept = Path(source) if self._local else cache / version.digest
        if not self._local and not kept.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=".") as scratch:
                fresh = self._download(source, Path(scratch) / "files", version.files)
                _compare(f"{version} from {version.location}", fresh, version.files)
                # Fails where another process was faster; its folder is then checked like any kept one.
                with suppress(OSError):
                    return fresh.rename(kept)
        _compare(str(version), kept, version.files)
        return kept

    def _url(self, path: str) -> str:
        return path if self._local else str(self._fs.unstrip_protocol(path))

    def _names(self, path: str) -> list[str]:
        # Remote file systems remember listings, and another process may have added to this one.
        self._fs.invalidate_cache(path)
        try:
            return [str(entry).rstrip("/").rpartition("/")[2] for entry in self._fs.ls(path, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _numbered(self, path: str) -> list[int]:
        return sorted(int(name) for name in self._names(path) if NUMBER.fullmatch(name))

    def _numbers(self, model: str) -> list[int]:
        found = self._numbered(f"{self._path}/{model}")
        return [number for number in found if MANIFEST in self._names(f"{self._path}/{model}/{number}")]

    def _known_numbers(self, model: str) -> list[int]:
        numbers = self._numbers(model)
        if not numbers:
            known = self.models()
            hint = "".join(f" Did you mean {near!r}?" for near in difflib.get_close_matches(model, known, n=1))
            raise RegistryError(f"{self.root}: no model {model!r}; it has {_listed(known)}.{hint}")
        return numbers

    def _held(self, model: str, alias: str) -> tuple[int, int | None]:
        """How often the alias was moved, and the number that the last move gave it."""
        folder = f"{self._path}/{model}/aliases/{alias}"
        moves = self._numbered(folder)
        return (moves[-1], int(self._fs.cat_file(f"{folder}/{moves[-1]}"))) if moves else (0, None)

    def _manifest(self, model: str, number: int) -> ModelVersion:
        _require_name(model, "model")
        folder = f"{self._path}/{model}/{number}"
        where = f"{self._url(folder)}/{MANIFEST}"
        try:
            data = json.loads(self._fs.cat_file(f"{folder}/{MANIFEST}"))
            # The digest names a cache folder and the paths get written to, so neither is taken on trust.
            says = (data.pop("schema"), data["model"], data["version"], data["digest"])
            needs = (SCHEMA, model, number, _digest_of(data["files"]))
            paths = [PurePosixPath(path) for path in data["files"]]
            if says != needs or any(path.is_absolute() or ".." in path.parts for path in paths):
                raise ValueError(f"it says {says}, needed {needs} and paths inside the folder")
            return ModelVersion.from_json({**data, "location": self._url(folder)})
        except FileNotFoundError:
            known = _listed(self._known_numbers(model))
            raise RegistryError(f"{model}: no version {number}; it has {known}.") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BrokenVersion(f"{where}: not a manifest that this banjoray wrote: {error!r}. Restore it.") from error

    def _claim(self, model: str) -> int:
        claims = f"{self._path}/{model}/claims"
        taken = max([0, *self._numbered(claims), *self._numbered(f"{self._path}/{model}")])
        return next(n for n in itertools.count(taken + 1) if self._create(f"{claims}/{n}", f"{model}@{n}"))

    def _upload(self, folder: Path, target: str, files: Iterable[str]) -> None:
        for path in files:
            self._fs.makedirs(f"{target}/{path}".rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(folder / path), f"{target}/{path}")

    def _download(self, source: str, folder: Path, files: Iterable[str]) -> Path:
        for path in files:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            # The comparison that follows every download names a file that was not there.
            with suppress(FileNotFoundError):
                self._fs.get_file(f"{source}/{path}", str(folder / path))
        return folder

    def _create(self, path: str, text: str) -> bool:
        """Whether ``path`` is now there, whole and by our doing; False where it was there before."""
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        try:
            if self._local:
                _link_new(Path(path), f"{text}\n".encode())
            else:
                self._fs.pipe_file(path, f"{text}\n".encode(), mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            raise RegistryError(f"{self.root}: {error}; needed to create files, on disks by hard link.") from error
        return True


def _link_new(path: Path, content: bytes) -> None:
    # A rename would replace what another process just put there, and open("x") would show half a file.
    fresh = path.with_name(f"{MANIFEST}.{uuid.uuid4().hex}")
    try:
        with fresh.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(fresh)
    finally:
        fresh.unlink(missing_ok=True)


def _require_name(name: str, what: str) -> None:
    if not NAME.fullmatch(name) or (what == "alias" and name.isdigit()):
        raise RegistryError(f"{what} {name!r}: needed a name, {NAMES}; an alias has more than digits.")


def _listed(things: Iterable[str | int]) -> str:
    return ", ".join(repr(thing) for thing in things) or "none"


def _digests(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    # Skips the manifest, and the unlinked half of one whose writer was killed right after the link.
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(MANIFEST):
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _loadable(folder: Path) -> dict[str, str]:
    """The digests of a folder that holds something, and no pickle: loading a pickle runs whatever is in it."""
    files = _digests(folder)
    pickles = [path for path in files if PurePosixPath(path).suffix.lower() in PICKLES]
    if pickles:
        raise RegistryError(f"{folder}: found {_listed(pickles)}, needed safetensors only. Save it as safetensors.")
    if not files:
        raise RegistryError(f"{folder}: found no files, needed a Hugging Face folder. Save the model there first.")
    return files


def _digest_of(files: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{files[path]}  {path}\n" for path in sorted(files)).encode()).hexdigest()


def _compare(name: str, folder: Path, files: Mapping[str, str]) -> None:
    found = _digests(folder)
    for path in sorted(found.keys() | files.keys()):
        has, needs = (f"sha256 {side[path][:12]}" if path in side else "no file" for side in (found, files))
        if has != needs:
            raise BrokenVersion(f"{name}: {folder / path}: found {has}, needed {needs}. Restore it.")
