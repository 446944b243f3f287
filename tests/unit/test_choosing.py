"""A faster engine answers only where it agrees; what is made and decided is kept whole, or made again."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from banjoray.errors import ConfigError
from banjoray.registry import ModelVersion
from banjoray.serving import choosing
from banjoray.serving.choosing import (
    ASKED,
    PLAIN,
    Chosen,
    Kind,
    candidates,
    check_kind,
    engine_cache,
    fastest_that_agrees,
    kept_choice,
    kept_file,
    timed,
)
from banjoray.tasks.multi_label import MultiLabel
from banjoray.tasks.regression import Regression
from banjoray.tasks.task import Task, task_for
from banjoray.tasks.text_classification import TextClassification
from banjoray.tasks.zero_shot import ZeroShot

INT8, ONNX, BF16 = Kind("onnx", "int8"), Kind("onnx", "fp32"), Kind("torch", "bf16")


def test_the_fastest_that_agrees_is_taken_and_why_the_faster_ones_were_not_is_told() -> None:
    times = {PLAIN: 0.4, INT8: 0.1, BF16: 0.2, ONNX: 0.3}
    wrong = {INT8: "97.0% of 256 answers are those of fp32, needed 99.5%"}
    chosen = fastest_that_agrees(times, lambda kind: wrong.get(kind, ""), ["onnx x: no such file"])
    assert (chosen.engine, chosen.precision) == ("torch", "bf16")
    assert "onnx int8: 97.0% of 256 answers" in chosen.why
    assert "onnx x: no such file" in chosen.why
    assert dict(chosen.measured_ms) == {"torch fp32": 400, "onnx int8": 100, "torch bf16": 200, "onnx fp32": 300}


def test_slower_engines_are_not_even_asked_and_fp32_needs_no_check() -> None:
    asked: list[Kind] = []

    def wrong(kind: Kind) -> str:
        asked.append(kind)
        return "no"

    chosen = fastest_that_agrees({PLAIN: 0.2, INT8: 0.1, BF16: 0.3}, wrong)
    assert (chosen.engine, chosen.precision) == ("torch", "fp32")
    assert asked == [INT8]
    assert "onnx int8: no" in chosen.why


def test_where_none_that_was_asked_for_agrees_the_reasons_are_told() -> None:
    with pytest.raises(ConfigError, match=r"no engine that was asked for agrees.*onnx int8: no; onnx fp32: no"):
        fastest_that_agrees({ONNX: 0.2, INT8: 0.1}, lambda _: "no")


def test_times_are_the_fastest_of_rounds_in_turn_and_the_first_is_not_counted() -> None:
    now, turns = [0.0], list[Kind]()
    lasts = {PLAIN: iter((9.0, 3.0, 2.0)), INT8: iter((0.1, 1.0, 1.5))}

    def passing(kind: Kind) -> Callable[[], None]:
        def run() -> None:
            turns.append(kind)
            now[0] += next(lasts[kind])

        return run

    assert timed({kind: passing(kind) for kind in lasts}, lambda: now[0]) == pytest.approx({PLAIN: 2.0, INT8: 1.0})
    assert turns == [PLAIN, INT8] * 3


@pytest.mark.parametrize(
    ("asked", "generates", "device", "found"),
    [
        (("auto", "auto"), False, "cpu", {PLAIN, BF16, ONNX, INT8}),
        (("auto", "auto"), True, "cpu", {PLAIN}),
        (("onnx", "auto"), False, "cpu", {ONNX, INT8}),
        (("auto", "int8"), False, "cpu", {INT8}),
        (("auto", "fp32"), False, "cpu", {PLAIN, ONNX}),
        (("torch", "bf16"), True, "cpu", {BF16}),
        (("auto", "auto"), False, "cuda", {PLAIN, BF16}),
        (("torch", "fp16"), False, "cuda", {Kind("torch", "fp16")}),
    ],
)
def test_candidates_are_what_fits_the_question_the_task_and_the_device(
    asked: tuple[str, str], generates: bool, device: str, found: set[Kind], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "native_bf16", lambda _: "amx_bf16")
    assert set(candidates(*asked, generates, device)) == found


def test_bf16_that_a_processor_has_to_emulate_is_no_candidate_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "native_bf16", lambda _: "")
    assert BF16 not in candidates("auto", "auto", False, "cpu")
    assert Kind("torch", "fp16") in candidates("auto", "auto", False, "cuda")
    assert candidates("torch", "bf16", False, "cpu") == [BF16]


@pytest.mark.parametrize(
    ("engine", "precision", "task", "says"),
    [
        ("onnx", "auto", "text-generation", "text-generation writes texts"),
        ("auto", "int8", "translation", "translation writes texts"),
        ("onnx", "bf16", "text-classification", "found bf16 with engine: onnx"),
        ("torch", "int8", "text-classification", "found int8 with engine: torch"),
    ],
)
def test_what_no_machine_has_is_refused_with_what_there_is(engine: str, precision: str, task: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_kind(engine, precision, task)
    check_kind("auto", "auto", task)


def test_fp16_on_a_cpu_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"precision: fp16; a version on cpu has torch fp32, torch bf16, onnx fp32"):
        candidates("torch", "fp16", False, "cpu")


def test_a_kept_file_is_made_once_and_again_where_it_is_torn(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(file: Path) -> None:
        made.append(file)
        file.write_bytes(b"graph " * 100)

    file = tmp_path / "int8.onnx"
    assert kept_file(file, make) == kept_file(file, make) == file
    assert len(made) == 1
    for spoil in (lambda: file.write_bytes(b"graph"), file.unlink, (tmp_path / "int8.onnx.sha256").unlink):
        spoil()
        kept_file(file, make)
        assert file.read_bytes() == b"graph " * 100
    assert len(made) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx", "int8.onnx.sha256"]


def test_a_file_that_could_not_be_made_leaves_nothing(tmp_path: Path) -> None:
    def fail(file: Path) -> None:
        file.write_bytes(b"half")
        raise ConfigError("onnx: no such operator")

    with pytest.raises(ConfigError, match="no such operator"):
        kept_file(tmp_path / "fp32.onnx", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_choice_is_kept_for_the_same_question_and_made_again_where_it_is_torn(tmp_path: Path) -> None:
    asked: list[int] = []

    def choose() -> Chosen:
        asked.append(1)
        return Chosen("onnx", "int8", "the fastest", (("onnx int8", 1.5), ("torch fp32", 9.0)))

    first = kept_choice(tmp_path, ["auto", "auto"], choose)
    assert kept_choice(tmp_path, ["auto", "auto"], choose) == first
    assert len(asked) == 1
    kept_choice(tmp_path, ["onnx", "auto"], choose)
    assert len(asked) == 2
    for file in tmp_path.iterdir():
        file.write_text(file.read_text()[:20])
    assert kept_choice(tmp_path, ["auto", "auto"], choose) == first
    assert len(asked) == 3
    assert json.loads(json.dumps(first.to_json()))["measured_ms"] == {"onnx int8": 1.5, "torch fp32": 9.0}


def test_what_is_made_of_a_version_stands_beside_it_and_of_a_remote_one_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    version = ModelVersion("tiny", 1, "text-classification", (), {}, {}, {}, "", "d" * 64, "")
    beside = engine_cache(str(tmp_path / "registry"), version)
    assert beside.parent == tmp_path / "registry" / ".engines"
    assert beside.name.startswith("d" * 32)
    assert engine_cache("memory://registry", version).is_relative_to(tmp_path / "home")
    # A file where the folder should be: as a registry that can't be written to.
    (tmp_path / "closed").write_text("")
    assert engine_cache(str(tmp_path / "closed"), version).is_relative_to(tmp_path / "home")


def test_answers_are_compared_as_the_task_reads_them() -> None:
    one, other = np.array([0.1, 0.9]), np.array([0.2, 0.3])
    assert task_for("text-classification").same(one, other).all()
    assert not task_for("text-classification").same(one, other[::-1]).any()
    tokens = np.array([[0.1, 0.9], [0.9, 0.1], [0.2, 0.8]])
    assert task_for("token-classification").same(tokens, tokens[[0, 0, 2]]).tolist() == [True, False, True]
    embeddings = task_for("feature-extraction")
    assert embeddings.same(tokens, 2 * tokens).all()
    assert not embeddings.same(one, np.array([0.3, 0.9])).any()
    fill_mask = task_for("fill-mask")
    assert fill_mask.same(np.array([5.01, 4, 2]), np.array([5.0, 4, 1])).all()
    assert not fill_mask.same(np.array([5.2, 4, 2]), np.array([5.0, 4, 2])).any()


@pytest.mark.parametrize(
    ("task", "highest"),
    [(TextClassification, True), (MultiLabel, False), (Regression, False), (ZeroShot, False), (Task, False)],
)
def test_only_the_one_label_of_a_text_is_its_highest_logit(task: type[Task], highest: bool) -> None:
    assert task.highest_answers == highest


def test_an_engine_that_was_made_by_hand_is_told_as_asked_for() -> None:
    assert (ASKED.engine, ASKED.precision, ASKED.why) == ("torch", "fp32", "asked for")


def test_a_full_disk_is_no_reason_not_to_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(choosing, "write_whole", full)
    assert kept_choice(tmp_path, ["auto", "auto"], lambda: ASKED) == ASKED
    assert list(tmp_path.iterdir()) == []
