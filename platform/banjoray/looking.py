"""The verbs that look and start nothing: check, plan, data, inspect, schema."""

import json
from pathlib import Path
from typing import Annotated

import typer

from banjoray.errors import ConfigError
from banjoray.terminal import (
    AsJson,
    JobFile,
    Overrides,
    RegistryRoot,
    SkipBadRows,
    answer,
    job_of,
    quietly,
    saying,
    terminal,
    write_page,
)


def check(
    files: Annotated[list[Path], typer.Argument(help="Job files or serve configs.", show_default=False)],
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """Check files; nothing is started.

    A job file: keys, rows, labels, base model, freezing, tune.space. A serve config: its schema and its model.
    """
    from banjoray.config.job import read_yaml

    for file in files:
        told = _check_serve(file) if "applications" in read_yaml(file) else _check_job(file, skip_bad_rows)
        typer.echo(f"{file}: {told}")


def plan(
    file: JobFile,
    values: Overrides = [],  # noqa: B006
    skip_bad_rows: SkipBadRows = False,
    as_json: AsJson = False,
) -> None:
    """Say what a job will take; nothing is started."""
    job = job_of(file, values, skip_bad_rows).anchored(Path.cwd())
    from banjoray.reports.tables import plan_lines
    from banjoray.tuning.plan import plan as run

    found = quietly(lambda: run(job))
    for warning in found.warnings:
        saying(terminal())(warning)
    answer(found.to_json(), as_json, *plan_lines(found))


def data(
    file: JobFile,
    values: Overrides = [],  # noqa: B006
    page: Annotated[Path | None, typer.Option(help="Also write it as an HTML page, as data.html.")] = None,
    skip_bad_rows: SkipBadRows = False,
    as_json: AsJson = False,
) -> None:
    """Look at a job's rows before training.

    Labels, lengths, and rows that repeat, contradict another, are cut, or stand in two splits.
    """
    job = job_of(file, values, skip_bad_rows).anchored(Path.cwd())
    from banjoray.data.bad_rows import lines_about, write_list
    from banjoray.reports.profile import profile_lines, profile_page
    from banjoray.training.preflight import profiled

    found = quietly(lambda: profiled(job))
    for line in lines_about(found.left_out):
        saying(terminal())(line)
    if page:
        write_page(page, profile_page(job.name, found))
        if listed := write_list(found.left_out, str(page.parent)):
            saying(terminal())(f"all bad rows  {listed}")
    answer(found.to_json(), as_json, *profile_lines(found), *([f"page  {page}"] if page else []))


def inspect(
    target: Annotated[
        str, typer.Argument(help="A job file, a version (emotion@7), a folder, or a hub id.", show_default=False)
    ],
    text: Annotated[str | None, typer.Option(help="Also show what the tokenizer makes of this text.")] = None,
    attention: Annotated[
        Path | None, typer.Option(help="Write a page of how every head looks at --text, as attention.html.")
    ] = None,
    values: Overrides = [],  # noqa: B006
    registry: RegistryRoot = "./registry",
    as_json: AsJson = False,
) -> None:
    """Show what a model or a job's model is made of.

    Weights by part, what is trained, blocks and their names; of a job, memory by strategy too.
    """
    if attention and text is None:
        raise ConfigError("--attention: needs --text")
    from banjoray.reports.inspection import attention_page, inspection_lines
    from banjoray.reports.inspection import inspect as run

    found = quietly(lambda: run(target, registry, values, text))
    if attention:
        write_page(attention, quietly(lambda: attention_page(found)))
    answer(found.to_json(), as_json, *inspection_lines(found), *([f"attention  {attention}"] if attention else []))


def schema(
    kind: Annotated[
        str, typer.Argument(help="job, serve (the args of an application), or rollout (its user_config).")
    ] = "job",
) -> None:
    """Print the JSON Schema of a job file.

    Every key with its default, unit and rule; for editors and for reading.
    """
    from banjoray.config.job import JobConfig
    from banjoray.config.rollout import Rollout
    from banjoray.config.section import Section
    from banjoray.config.serve import ServeConfig

    kinds: dict[str, type[Section]] = {"job": JobConfig, "serve": ServeConfig, "rollout": Rollout}
    if kind not in kinds:
        raise ConfigError(f"schema: found '{kind}'; needed {', '.join(kinds)}")
    typer.echo(json.dumps(kinds[kind].model_json_schema(), indent=2))


def _check_job(file: Path, skip_bad_rows: bool) -> str:
    job = job_of(file, [], skip_bad_rows).anchored(Path.cwd())
    from banjoray.reports.tables import checked_line
    from banjoray.tuning.plan import checked

    ready, corners = quietly(lambda: checked(job))
    for warning in ready.warnings:
        saying(terminal())(warning)
    return checked_line(ready, len(corners))


def _check_serve(file: Path) -> str:
    def work() -> str:
        from banjoray.serving.app import read_config

        names = [application.name for application in read_config(file, None).applications]
        return f"ok, applications {', '.join(names)}"

    return quietly(work)
