"""The command line as a user meets it: fast help, one clear line for every mistake, answers on stdout."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
import yaml

from banjoray import cli
from factories import make_job, sample_rows, write_rows

BANJORAY = str(Path(sys.executable).parent / "banjoray")


class Done(NamedTuple):
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


class Call(Protocol):
    """Runs the command line in this process: importing torch for every mistake would take minutes."""

    def __call__(self, *arguments: str) -> Done: ...


@pytest.fixture
def call(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def inner(*arguments: str) -> Done:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["banjoray", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Done(int(ended.value.code or 0), captured.out, captured.err)

    return inner


def run(*arguments: str, cwd: Path | None = None, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BANJORAY, *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a valid tiny job in job.yaml."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "job.yaml").write_text(yaml.safe_dump(make_job(folder).to_json()), encoding="utf-8")
    return folder


def test_importing_the_command_line_loads_neither_torch_nor_ray_nor_pydantic() -> None:
    heavy = ["torch", "ray", "transformers", "datasets", "pydantic", "rich"]
    code = f"import sys, banjoray.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_verb_and_shows_each_in_one_line() -> None:
    done = run("--help")
    assert done.returncode == 0
    for verb in ("train", "tune", "score", "models", "promote", "serve", "submit", "check", "quickstart", "schema"):
        assert f"\n  {verb} " in done.stdout
    commands = done.stdout.partition("Commands:")[2]
    assert "..." not in commands


@pytest.mark.parametrize("verb", ["train", "tune", "score", "models", "promote", "serve", "submit", "check", "schema"])
def test_every_verb_has_help(verb: str, call: Call) -> None:
    done = call(verb, "--help")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_committed_json_schema_is_what_schema_prints() -> None:
    committed = Path(__file__).parents[2] / "docs/job.schema.json"
    assert run("schema").stdout == committed.read_text(encoding="utf-8")


Wrong = tuple[list[str], list[str]]
ROWS = [{"text": "good", "label": "a"}, {"text": "bad", "label": "b"}] * 4
WRONG_VALUES: dict[str, Wrong] = {
    "unknown key": (["train.learningrate=1"], ["unknown key 'train.learningrate'", "'train.learning_rate'"]),
    "wrong type": (["train.epochs=three"], ["train.epochs", "'three'", "integer"]),
    "no value": (["train.epochs"], ["--set train.epochs", "key=value"]),
    "unknown metric": (["train.metric=bleu"], ["train.metric", "'bleu'", "f1_macro"]),
    "missing file": (["data.files.train=nowhere.jsonl"], ["data.files.train", "nowhere.jsonl"]),
    "no such model": (["model.base=no/such-model"], ["model.base", "no/such-model", "hub"]),
    "missing column": (["data.columns.text=sentence"], ["'sentence'", "train.jsonl", "'text'", "data.columns.text"]),
    "too many layers": (["freeze={layers: 99}"], ["freeze.layers", "99", "3 blocks"]),
    "too long": (["data.max_length=4000"], ["data.max_length", "4000", "80 positions"]),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_wrong_value_gives_one_line_and_exit_code_2(name: str, call: Call) -> None:
    values, words = WRONG_VALUES[name]
    done = call("train", "job.yaml", *(part for value in values for part in ("--set", value)), "--json")
    _assert_one_line(done, words)


def test_more_workers_than_this_machine_holds_are_refused_before_they_start(folder: Path) -> None:
    done = run("train", "job.yaml", "--set", "scale.workers=400", "--set", "train.batch_size=400", cwd=folder)
    _assert_one_line(Done(done.returncode, done.stdout, done.stderr), ["scale", "400", "this machine has"])


WRONG_ROWS: dict[str, tuple[list[Any], list[str]]] = {
    "empty cell": ([*ROWS, {"text": "", "label": "a"}], ["wrong.jsonl row 9", "'text'"]),
    "missing cell": ([*ROWS, {"label": "a"}], ["wrong.jsonl row 9", "'text'"]),
    "a number for a text": ([{"text": 1, "label": "a"}], ["wrong.jsonl row 1", "'text'", "1"]),
    "a number among texts": ([*ROWS, {"text": 7, "label": "a"}], ["wrong.jsonl", "row 9", "'text'", "7"]),
    "one label": ([{"text": "x", "label": "a"}] * 4, ["wrong.jsonl", "'a'", "two"]),
    "a missing label": ([*ROWS, {"text": "x", "label": None}], ["wrong.jsonl row 9", "label"]),
    "no rows": ([], ["wrong.jsonl", "empty"]),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_a_wrong_row_gives_one_line_with_file_and_row_and_exit_code_2(name: str, folder: Path, call: Call) -> None:
    rows, words = WRONG_ROWS[name]
    path = write_rows(folder / "wrong.jsonl", rows)
    values = [f"data.files.train={path}", "data.files.validation=null", "data.files.test=null"]
    done = call("train", "job.yaml", *(part for value in values for part in ("--set", value)))
    _assert_one_line(done, words)


def test_a_broken_line_is_named_by_file_and_row(folder: Path, call: Call) -> None:
    (folder / "broken.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", \n', encoding="utf-8")
    done = call("train", "job.yaml", "--set", "data.files.train=broken.jsonl")
    _assert_one_line(done, ["broken.jsonl", "row 2", "JSON"])


def test_a_label_that_train_never_shows_is_named_by_file_and_row(folder: Path, call: Call) -> None:
    path = write_rows(folder / "held.jsonl", [*sample_rows("validation")[:3], {"text": "yuck", "label": "disgust"}])
    done = call("train", "job.yaml", "--set", f"data.files.validation={path}")
    _assert_one_line(done, ["held.jsonl row 4", "'disgust'", "sadness"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nowhere.yaml"], ["nowhere.yaml"]),
        (["tune", "job.yaml"], ["tune", "missing"]),
        (["score", "nobody@1", "--registry", "none"], ["nobody"]),
        (["promote", "a@b@c", "production"], ["a@b@c"]),
        (["serve", "job.yaml"], ["job.yaml", "applications"]),
        (["submit", "job.yaml", "--verb", "fly"], ["--verb", "fly"]),
        (["submit", "job.yaml", "--set", "storage=./here"], ["storage", "./here", "relative"]),
        (["schema", "cake"], ["cake"]),
    ],
)
def test_other_verbs_refuse_what_they_are_asked_in_one_line_too(
    arguments: list[str], words: list[str], call: Call
) -> None:
    _assert_one_line(call(*arguments), words)


def _assert_one_line(done: Done, words: list[str]) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert [word for word in words if word not in lines[0]] == []


def test_train_json_is_one_object_on_stdout_and_progress_is_on_stderr(folder: Path) -> None:
    done = run("train", "job.yaml", "--set", "train.epochs=1", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told) >= {"run_id", "checkpoint", "version", "metrics", "steps", "seconds", "rows_per_s"}
    assert {"accuracy", "f1_macro", "matthews", "loss", "calibration_error"} <= set(told["metrics"])
    assert told["steps"] == 6
    assert told["rows_per_s"] > 0
    assert (Path(told["checkpoint"]) / "model.safetensors").is_file()
    assert f"starting run {told['run_id']}" in done.stderr

    listed = json.loads(run("models", "--registry", str(folder / "registry"), "--json").stdout)
    assert [version["version"] for version in listed["tiny"]["versions"]] == [1]

    moved = run("promote", told["version"], "production", "--registry", str(folder / "registry"), "--expected", "0")
    assert moved.returncode == 0
    stale = run("promote", told["version"], "production", "--registry", str(folder / "registry"), "--expected", "0")
    assert stale.returncode == 1
    assert "StaleAlias" not in stale.stderr
    assert "found 1" in stale.stderr

    scored = run("score", "tiny@production", "--split", "validation", "--registry", str(folder / "registry"), "--json")
    assert json.loads(scored.stdout)["metrics"] == pytest.approx(told["metrics"], abs=1e-6)


@pytest.fixture(scope="module")
def bad_rows(folder: Path) -> list[str]:
    """Arguments that give the job a train file whose rows 2 and 9 can't be used."""
    lines = [json.dumps(row).encode() for row in sample_rows("train")[:96]]
    lines.insert(1, b'{"text": "caf\xe9", "label": "joy"}')
    lines.insert(8, b'{"text": " ", "label": "joy"}')
    (folder / "bad.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return ["job.yaml", "--set", "data.files.train=bad.jsonl"]


LISTED = [
    {"file": "bad.jsonl", "row": 2, "column": None, "reason": "line 2 is not UTF-8 (byte 14 of the line)"},
    {"file": "bad.jsonl", "row": 9, "column": "text", "reason": "holds only blanks; needed text"},
]
LEFT_OUT = [
    "train: 2 of 98 rows of bad.jsonl left out (not UTF-8: 1, no text: 1)",
    "  bad.jsonl: line 2 is not UTF-8 (byte 14 of the line)",
    "  bad.jsonl row 9, column 'text' holds only blanks; needed text",
]


def test_train_leaves_out_bad_rows_where_it_is_told_to_and_lists_them_in_the_runs_folder(
    folder: Path, bad_rows: list[str]
) -> None:
    done = run("train", *bad_rows, "--set", "train.epochs=1", "--skip-bad-rows", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert done.stderr.splitlines()[:3] == LEFT_OUT
    listed = folder / "runs" / told["run_id"] / "bad_rows.jsonl"
    assert f"all bad rows  {listed}" in done.stderr.splitlines()
    assert [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()] == LISTED

    scored = run("score", told["version"], "--split", "validation", "--registry", str(folder / "registry"), "--json")
    assert json.loads(scored.stdout)["metrics"] == pytest.approx(told["metrics"], abs=1e-6)
    assert json.loads(scored.stdout)["same_data"]
    assert scored.stderr.splitlines() == LEFT_OUT
    assert "--skip-bad-rows" in run("score", "--help").stdout


@pytest.mark.parametrize("verb", ["train", "tune", "plan", "data"])
def test_verbs_that_read_rows_refuse_bad_ones_unless_told_to_leave_them_out(
    verb: str, bad_rows: list[str], call: Call
) -> None:
    assert "--skip-bad-rows" in call(verb, "--help").stdout
    space = ["--set", "tune.space.train.learning_rate={loguniform: [0.0001, 0.001]}"] * (verb == "tune")
    done = call(verb, *bad_rows, *space)
    _assert_one_line(done, ["bad.jsonl can't be read: line 2 is not UTF-8 (byte 14 of the line)"])


def test_looking_at_a_job_tells_of_the_rows_that_are_left_out(folder: Path, bad_rows: list[str], call: Call) -> None:
    planned = call("plan", *bad_rows, "--skip-bad-rows", "--json")
    assert (json.loads(planned.stdout)["work"]["train_rows"], planned.stderr.splitlines()) == (96, LEFT_OUT)

    looked = call("data", *bad_rows, "--skip-bad-rows", "--page", "data.html", "--json")
    assert json.loads(looked.stdout)["left_out"][0]["bad"] == LISTED
    assert looked.stderr.splitlines() == [*LEFT_OUT, "all bad rows  ./bad_rows.jsonl"]
    assert [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()] == LISTED

    tree = yaml.safe_load((folder / "job.yaml").read_text(encoding="utf-8"))
    tree["data"]["files"]["train"] = "bad.jsonl"
    (folder / "bad.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    _assert_one_line(call("check", "bad.yaml"), ["bad.jsonl can't be read"])
    checked = call("check", "bad.yaml", "--skip-bad-rows")
    assert (checked.returncode, checked.stderr.splitlines()) == (0, LEFT_OUT)


def test_a_gate_that_refuses_gives_exit_code_3(folder: Path) -> None:
    done = run("train", "job.yaml", "--set", "train.epochs=1", "--set", "registry.gate.at_least=1.1", cwd=folder)
    assert done.returncode == 3
    assert "f1_macro" in done.stderr
    assert "1.1" in done.stderr


def test_nothing_a_user_did_wrong_shows_a_traceback_and_a_bug_of_ours_does() -> None:
    code = "import banjoray.cli as cli; cli.job_of = lambda *_: 1 / 0; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "x.yaml"],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_keys_are_printed_once_kept_as_hashes_and_revoked(folder: Path, call: Call) -> None:
    made = call("keys", "new", "alice")
    assert (made.returncode, made.stderr) == (0, "")
    key = made.stdout.strip()
    assert made.stdout == f"{key}\n"
    kept = (folder / "keys.yaml").read_text(encoding="utf-8")
    assert key not in kept
    assert "alice: sha256:" in kept
    told = json.loads(call("keys", "new", "bob", "--file", "keys.yaml", "--json").stdout)
    assert (told["name"], told["file"]) == ("bob", "keys.yaml")
    _assert_one_line(call("keys", "new", "alice"), ["keys.yaml", "'alice'", "revoke"])
    assert call("keys", "revoke", "alice").stdout == "alice has no key in keys.yaml any more\n"
    _assert_one_line(call("keys", "revoke", "alice"), ["keys.yaml", "no key 'alice'", "bob"])


def test_the_lines_about_keys_in_the_docs_run_as_they_stand(tmp_path: Path, call: Call) -> None:
    page = (Path(__file__).parents[2] / "docs/safety.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert [line[:3] for line in lines] == [["banjoray", "keys", verb] for verb in ("new", "new", "revoke")]
    for _, *arguments in lines:
        done = call(*[str(tmp_path / part) if part == "keys.yaml" else part for part in arguments])
        assert (done.returncode, done.stderr) == (0, "")
    assert "alice-2: sha256:" in (tmp_path / "keys.yaml").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_one_line_too(call: Call) -> None:
    done = call("data", "job.yaml", "--page", "no/such/folder/data.html")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["error: no/such/folder/data.html: can't be written (No such file or directory)"]
