"""Every key of the configs: it has a description, code that reads it, and a part in the job's digest."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

import banjoray
from banjoray.config.job import JobConfig
from banjoray.config.rollout import Rollout
from banjoray.config.section import Section, validate
from banjoray.config.serve import ServeConfig

PACKAGE = Path(banjoray.__file__).parent
JOB = {
    "name": "tiny",
    "task": "text-classification",
    "data": {"files": {"train": "a.csv"}},
    "freeze": {"layers": 1},
    "adapter": {},
    "tune": {"space": {"train.learning_rate": {"loguniform": [1e-5, 1e-3]}}},
}


def leaves(section: Section, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from leaves(value, (*prefix, name))
        else:
            yield (*prefix, name)


def replaced(section: Section, path: tuple[str, ...], value: object) -> Any:
    """A copy with one value changed and not validated: the digest must not care what a value means."""
    name, *rest = path
    inner = replaced(getattr(section, name), tuple(rest), value) if rest else value
    return section.model_copy(update={name: inner})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_the_digest_changes_with_every_value_and_the_training_digest_with_those_that_train() -> None:
    job = validate(JobConfig, JOB, "job")
    paths = list(leaves(job))
    assert len(paths) > 60
    assert ("adapter", "merge") in paths
    assert ("train", "batching", "max_tokens") in paths
    for path in paths:
        other = replaced(job, path, "something else")
        assert other.digest() != job.digest(), path
        trains = (
            path[0] not in ("registry", "storage", "tune", "hub", "scale", "tracking", "cache")
            and "checkpoint" not in path[-1]
        )
        assert (other.training_digest() != job.training_digest()) == trains, path


def test_equal_jobs_have_equal_digests_whatever_the_order_of_their_keys() -> None:
    forwards = JOB | {"train": {"epochs": 1, "seed": 2}}
    backwards = {"train": {"seed": 2, "epochs": 1}} | {key: JOB[key] for key in reversed(JOB)}
    assert validate(JobConfig, forwards, "a").digest() == validate(JobConfig, backwards, "b").digest()


def sections(kind: type[Section]) -> Iterator[type[Section]]:
    yield kind

    def inside(annotation: Any) -> Iterator[type[Section]]:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from sections(annotation)
        for part in get_args(annotation):
            yield from inside(part)

    for field in kind.model_fields.values():
        yield from inside(field.annotation)


FILES = (JobConfig, ServeConfig, Rollout)
ALL_SECTIONS = sorted({kind for whole in FILES for kind in sections(whole)}, key=lambda kind: kind.__name__)


def names_read(source: str) -> set[str]:
    """Names that code reads as an attribute, matches on, or writes as text (a dictionary's key, or getattr's)."""
    nodes = list(ast.walk(ast.parse(source)))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    attributes |= {name for node in nodes if isinstance(node, ast.MatchClass) for name in node.kwd_attrs}
    return attributes | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("kind", ALL_SECTIONS, ids=lambda kind: kind.__name__)
def test_every_config_key_has_a_reader_outside_the_config(kind: type[Section]) -> None:
    files = [path for path in PACKAGE.rglob("*.py") if PACKAGE / "config" not in path.parents]
    read = set().union(*(names_read(path.read_text(encoding="utf-8")) for path in files))
    assert set(kind.model_fields) <= read


def test_the_search_for_readers_sees_reads_only() -> None:
    source = "job.a.b\njob.c = 1\nd = {'e': 1}\nmatch job:\n    case Freeze(f=g): h"
    assert names_read(source) == {"a", "b", "e", "f"}


@pytest.mark.parametrize("kind", FILES, ids=lambda kind: kind.__name__)
def test_the_json_schema_describes_every_key(kind: type[Section]) -> None:
    schema = kind.model_json_schema()
    defined = schema.get("$defs", {})
    for name, part in {kind.__name__: schema, **defined}.items():
        assert part["additionalProperties"] is False, name
        for key, described in part["properties"].items():
            # Where a key and its section say the same, pydantic writes it once.
            section = defined.get(described.get("$ref", "").removeprefix("#/$defs/"), {})
            assert described.get("description") or section.get("description"), f"{name}.{key}"


@pytest.mark.parametrize("kind", ALL_SECTIONS, ids=lambda kind: kind.__name__)
def test_every_key_says_what_it_is_in_a_sentence(kind: type[Section]) -> None:
    for name, field in kind.model_fields.items():
        assert len((field.description or "").split()) >= 2, name
