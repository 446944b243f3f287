"""How the code is laid out: who may import whom, where Ray stands, how long things are, and what every error keeps."""

import ast
import copy
import inspect
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banjoray import errors
from banjoray.errors import BanjorayError, RequestError

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "platform" / "banjoray"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Data moves from left to right; a module may import from its own folder, and from what stands left of it.
LAYERS = (
    ("errors", "garbage"),
    ("config",),
    ("registry",),
    ("data",),
    ("tasks",),
    ("models",),
    ("training", "serving.engine"),
    ("tuning",),
    ("serving",),
    ("cluster",),
    ("reports",),
    ("quickstart",),
    ("terminal",),
    ("looking",),
    ("endpoints",),
    ("cli",),
)
# The one pair on the same step: an engine pads and moves tensors as evaluation does.
NEIGHBOURS = {("serving.engine", "training.scoring")}
RAY = {
    "training/run.py",
    "training/workers.py",
    "training/group.py",
    "tuning/run.py",
    "serving/app.py",
    "serving/batch.py",
    "cluster/submit.py",
    "cluster/deploy.py",
}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def name_of(path: Path) -> str:
    """The module's dotted name inside the package; empty for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def step(module: str) -> int:
    """How far right a module stands; the longest matching name counts, as serving.engine before serving."""
    matches = [
        (len(name), number)
        for number, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert matches, f"{module} stands in no layer"
    return max(matches)[1]


def imports(source: str) -> Iterator[str]:
    """The modules that code imports, and the names from them, inside functions too; relative ones with their dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> Iterator[str]:
    known = {name_of(module) for module in MODULES}
    for module in imports(path.read_text(encoding="utf-8")):
        inside = module.removeprefix("banjoray").removeprefix(".")
        if module.split(".")[0] == "banjoray" and inside in known - {""}:
            yield inside


def may_import(module: str, other: str) -> bool:
    same_folder = module.split(".")[0] == other.split(".")[0]
    return same_folder or step(other) < step(module) or (module, other) in NEIGHBOURS


@pytest.mark.parametrize("path", [path for path in MODULES if name_of(path)], ids=name_of)
def test_imports_point_left(path: Path) -> None:
    module = name_of(path)
    assert [other for other in ours(path) if not may_import(module, other)] == []
    assert not [name for name in imports(path.read_text(encoding="utf-8")) if name.startswith(".")]


def test_an_import_that_points_right_would_be_seen() -> None:
    assert may_import("training.loop", "data.tokens")
    assert may_import("serving.engine", "training.scoring")
    assert may_import("training.run", "training.loop")
    for module, other in (
        ("data.splits", "training.loop"),
        ("config.job", "data.sources"),
        ("training.loop", "serving.engine"),
        ("serving.engine", "training.loop"),
        ("tuning.space", "serving.app"),
        ("registry", "models.loading"),
    ):
        assert not may_import(module, other)
    assert list(imports("def f():\n    from banjoray.cli import main")) == ["banjoray.cli", "banjoray.cli.main"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_ray_stands_in_the_files_that_drive_it_and_nowhere_else(path: Path) -> None:
    uses = any(module.split(".")[0] == "ray" for module in imports(path.read_text(encoding="utf-8")))
    assert not uses or path.relative_to(PACKAGE).as_posix() in RAY


def test_what_drives_a_run_of_one_worker_imports_no_ray_train() -> None:
    """It takes a second, in the driver and in the worker again."""
    script = "import sys; import banjoray.training.run; print('ray' in sys.modules, 'ray.train' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_the_files_that_may_use_ray_and_are_there_do() -> None:
    there = [PACKAGE / name for name in RAY if (PACKAGE / name).exists()]
    assert len(there) >= 4
    assert all("ray" in {module.split(".")[0] for module in imports(path.read_text())} for path in there)


def test_the_folder_platform_is_no_package_and_leaves_the_standard_library_alone() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    source = (
        "import platform, os, banjoray; print(platform.system(), platform.__file__, os.__file__, banjoray.__file__)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", source],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "platform"},
        capture_output=True,
        text=True,
        check=True,
    )
    system, module, library, package = ran.stdout.split()
    assert system in ("Linux", "Darwin", "Windows")
    assert Path(module) == Path(library).with_name("platform.py")
    assert Path(package) == PACKAGE / "__init__.py"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST_FILE
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = [(node.name, (node.end_lineno or 0) - node.lineno + 1) for node in functions]
    assert [(name, length) for name, length in lengths if length > LONGEST_FUNCTION] == []


def tracked() -> list[Path]:
    """The files that belong to the project; in an unpacked source archive, all of them."""
    if not (ROOT / ".git").exists():
        return [
            path for folder in ("platform", "tests", "jobs", "serve_configs") for path in (ROOT / folder).rglob("*.*")
        ]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    # A file that was deleted and not yet committed is listed too.
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_has_a_name_that_promises_nothing() -> None:
    empty = {"utils", "util", "helpers", "helper", "common", "base", "misc"}
    assert [path for path in tracked() if path.suffix == ".py" and path.stem in empty] == []


def test_nothing_is_left_for_later_in_the_files() -> None:
    # Put together here, so that this file is not one of its own findings.
    marks = re.compile(rf"\b({'|'.join(('TO' + 'DO', 'FIX' + 'ME', 'X' * 3, 'HA' + 'CK', 'T' + 'BD', 'W' + 'IP'))})\b")
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path}:{text.count(chr(10), 0, hit.start()) + 1}: {hit.group()}" for hit in marks.finditer(text)]
    assert found == []


ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, BanjorayError)]
COPIES: dict[str, Callable[[BanjorayError], BanjorayError]] = {
    "pickle": lambda error: pickle.loads(pickle.dumps(error)),
    "copy": copy.copy,
}


@pytest.mark.parametrize("by", COPIES)
@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_survives_the_way_between_processes(kind: type[BanjorayError], by: str) -> None:
    message = "data: train.jsonl row 3, column 'text' holds nothing; needed text"
    error = kind(message)
    again = COPIES[by](error)
    assert type(again) is kind
    assert str(again) == message == str(error)
    assert again.exit_code == kind.exit_code


@pytest.mark.parametrize("by", COPIES)
def test_a_request_error_keeps_its_status_and_message(by: str) -> None:
    again = COPIES[by](RequestError("too many rows", 413))
    assert isinstance(again, RequestError)
    assert (again.status, again.message, str(again)) == (413, "too many rows", "too many rows")
    assert RequestError("wrong shape").status == 422


def test_every_error_is_drawn_with_its_exit_code_and_every_exit_code_is_one_that_the_command_line_has() -> None:
    drawing = errors.__doc__ or ""
    for kind in ERRORS:
        line = next(line for line in drawing.splitlines() if re.search(rf"\b{kind.__name__}\b", line))
        code = re.search(rf"{kind.__name__} +(\d|-)", line)
        # Where no code is drawn, it is the parent's.
        assert code.group(1) in ("-", str(kind.exit_code)) if code else "exit_code" not in vars(kind), line
        assert kind.exit_code in (1, 2, 3)


def broad(source: str) -> Iterator[str]:
    """The `except` lines that catch everything, say no reason, and do not raise it again."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        names = (
            {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)} if node.type else {"BaseException"}
        )
        passed_on = any(isinstance(statement, ast.Raise) and statement.exc is None for statement in node.body)
        line = lines[node.lineno - 1]
        if names & {"Exception", "BaseException"} and not passed_on and not re.search(r"# noqa: BLE001 +\w+ \w+", line):
            yield line.strip()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_catches_everything_without_a_reason(path: Path) -> None:
    assert list(broad(path.read_text(encoding="utf-8"))) == []


def test_a_broad_except_would_be_seen() -> None:
    body = "try:\n    f()\n{}\n    g()"
    for line in (
        "except:",
        "except Exception:",
        "except (ValueError, Exception) as e:",
        "except Exception:  # noqa: BLE001",
    ):
        assert list(broad(body.format(line))) == [line]
    for line in ("except ValueError:", "except Exception:  # noqa: BLE001  one batch fails, the rest go on"):
        assert list(broad(body.format(line))) == []


@pytest.mark.parametrize(
    "name",
    ["platform/banjoray", "jobs", "serve_configs", "tests", "k8s", "README.md", "LICENSE", "pyproject.toml"],
)
def test_every_promise_of_the_top_folder_is_kept(name: str) -> None:
    place = ROOT / name
    assert place.is_file() or any(place.iterdir())
