"""Every tiny job file from its rows to its answers: trained or searched, scored again, and asked for a whole file."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import banjoray
from banjoray.config.job import JobConfig, load_job
from banjoray.data.sources import SHIPPED
from banjoray.registry import ModelVersion, Registry
from banjoray.serving.batch import predict
from engines import ask, engine_of, near
from factories import write_rows

pytestmark = pytest.mark.usefixtures("local_ray")

FILES = sorted((Path(__file__).parents[2] / "jobs/tiny").glob("*.yaml"))
# One file of every task: a searched model, or one with its adapter merged, is asked as the others of its task are.
ASKED = list({load_job(path).task: path for path in FILES if path.name.startswith("train_")}.values())
MASK = "[MASK]"
PARAMETERS: dict[str, dict[str, Any]] = {
    "zero-shot-classification": {"candidate_labels": ["music", "sport", "travel"]},
    "token-classification": {"ignore_labels": []},
}


@dataclass(frozen=True)
class Made:
    """What came of a job file: the job as it ran, and the version that it registered."""

    job: JobConfig
    version: ModelVersion


def inputs_of(task: str, row: dict[str, Any]) -> Any:
    """What a client would send for a row."""
    match task, row:
        case "zero-shot-classification", {"premise": premise}:
            return premise
        case _, {"premise": premise, "hypothesis": hypothesis}:
            return {"text": premise, "text_pair": hypothesis}
        case _, {"first": first, "second": second}:
            return {"text": first, "text_pair": second}
        case _, {"question": question, "context": context}:
            return {"question": question, "context": context}
        case _, {"tokens": tokens}:
            return " ".join(tokens)
        case _, {"translation": {"en": text}}:
            return text
        case _, {"text": text} | {"dialogue": text} | {"question": text}:
            return text
    raise AssertionError(f"no client would know what to send of {row}")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Made]:
    """Runs a job file, once."""

    @cache
    def run(path: Path) -> Made:
        folder = tmp_path_factory.mktemp(path.stem)
        job = load_job(path, [f"storage={folder / 'runs'}", f"registry.root={folder / 'registry'}"])
        name = (banjoray.tune(job) if job.tune else banjoray.train(job)).version
        return Made(job, Registry(job.registry.root).resolve(name))

    return run


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_tiny_job_registers_a_version_that_has_its_score_when_loaded_afresh(
    path: Path, make: Callable[[Path], Made]
) -> None:
    made = make(path)
    assert str(made.version) == f"{made.job.model_name}@1"
    assert made.version.lineage["base"] == made.job.model.base
    found = banjoray.score(str(made.version), "validation", made.job.registry.root)
    assert found.same_data
    # As it comes back from a worker, where one scores.
    assert pickle.loads(pickle.dumps(found.score)) == found.score
    again = {name: found.score.metrics[name] for name in made.version.metrics}
    assert again == pytest.approx(made.version.metrics, abs=1e-5)


@pytest.mark.parametrize("path", ASKED, ids=lambda path: path.stem)
def test_a_file_of_rows_gets_the_answers_that_each_row_gets_alone(
    path: Path, make: Callable[[Path], Made], tmp_path: Path
) -> None:
    made = make(path)
    name = str(made.job.data.source).removeprefix("banjoray:")
    lines = (SHIPPED / name / "test.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    rows = [json.loads(line) for line in lines]
    if made.job.task == "fill-mask":
        rows = [row | {"text": " ".join([*row["text"].split()[:-1], MASK])} for row in rows]
    parameters = PARAMETERS.get(made.job.task, {})
    file, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    found = predict(str(made.version), str(file), str(out), made.job.registry.root, parameters)
    assert (found.rows, found.failed, found.first_errors) == (len(rows), 0, ())
    told = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["row"] for line in told] == list(range(1, len(rows) + 1))
    engine = engine_of(made.job, made.version)
    asked = [{"inputs": inputs_of(made.job.task, row), "parameters": parameters} for row in rows]
    alone = [ask(engine, request, together=False) for request in asked]
    assert [line["answer"] for line in told] == [near(answer) for answer in alone]
    # A T5 of random weights writes the same of every text.
    assert made.job.task == "translation" or len({json.dumps(answer) for answer in alone}) > 1
