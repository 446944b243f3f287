"""The command line: read arguments, make a config, make one call, print the answer.

stdout carries the answer, with ``--json`` exactly one JSON object; stderr carries progress. Exit codes: 0 done,
1 the run failed, 2 you asked for something wrong, 3 a gate refused.
"""

import atexit
import gc
import json
import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from banjoray import __version__
from banjoray.endpoints import deploy, keys, rollback, serve
from banjoray.errors import BanjorayError, ConfigError
from banjoray.looking import check, data, inspect, plan, schema
from banjoray.terminal import (
    AsJson,
    JobFile,
    Overrides,
    Profile,
    Reference,
    RegistryRoot,
    SkipBadRows,
    answer,
    job_of,
    metrics_text,
    quietly,
    saying,
    terminal,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer(
    name="banjoray",
    help="One job file takes raw text to an HTTP answer: fine-tune, search, register and serve transformers on Ray.",
    epilog="Start with: banjoray quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The ``banjoray`` command."""
    # SIGTERM ends a command as Ctrl-C does, so that what it started is stopped; also in the background of a script,
    # where shells ignore SIGINT.
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    # torch, transformers and Ray are half a million objects, and none is garbage. To look through them as often as
    # Python does is a fifth of the time of importing them, and once more at the end takes a second or two.
    gc.set_threshold(50_000, 20, 20)
    atexit.register(gc.freeze)
    try:
        app()
    except BanjorayError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)  # noqa: T201
        sys.exit(130)


def _interrupt(number: int, frame: object) -> None:  # noqa: ARG001
    raise KeyboardInterrupt


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def train(
    file: JobFile,
    values: Overrides = [],  # noqa: B006  typer wants a list
    skip_bad_rows: SkipBadRows = False,
    as_json: AsJson = False,
    profile: Profile = False,
) -> None:
    """Train a model and register it.

    The same command goes on with an unfinished run; a SIGTERM ends it with a checkpoint.
    """
    job = job_of(file, values, skip_bad_rows)
    console = terminal()

    def work() -> Any:
        from banjoray.reports.progress import RunProgress
        from banjoray.training.run import train as run

        progress = RunProgress(console)
        with progress.shown():
            return run(job, watch=progress, say=saying(console), exact=profile)

    result = quietly(work)
    speed = f"{result.steps} steps, {result.seconds:.0f} s, {result.rows_per_s:.0f} rows/s"
    text = [
        f"{result.version}  {metrics_text(result.metrics)}  ({speed})",
        f"checkpoint  {result.checkpoint}",
        f"next        banjoray promote {result.version} production",
    ]
    if profile:
        from banjoray.reports.tables import profile_table

        console.print(profile_table(result.profile))
    answer(result.to_json(), as_json, *text)


@app.command()
def tune(
    file: JobFile,
    values: Overrides = [],  # noqa: B006
    skip_bad_rows: SkipBadRows = False,
    as_json: AsJson = False,
) -> None:
    """Search tune.space and register the best run.

    The same command goes on with an unfinished study; finished trials are not run again.
    """
    job = job_of(file, values, skip_bad_rows)
    console = terminal()

    def work() -> Any:
        from banjoray.reports.study import write_page
        from banjoray.reports.study_progress import StudyProgress
        from banjoray.tuning.run import tune as run

        with StudyProgress(console, job).shown() as watch:
            result = run(job, watch=watch, say=saying(console))
        return result, write_page(result, f"{job.storage}/{result.study_id}")

    result, page = quietly(work)
    from banjoray.reports.tables import importances_line, trials_table

    text: list[RenderableType] = [
        trials_table([trial.to_json() for trial in result.trials], result.metric),
        f"{result.version}  {result.metric} {result.score:.4f}  from trial {result.trial}",
        importances_line(result.importances, result.freed_bytes),
        f"pictures    {page}",
        f"next        banjoray promote {result.version} production",
    ]
    answer(result.to_json(), as_json, *(line for line in text if line))


@app.command()
def score(
    reference: Reference,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    registry: RegistryRoot = "./registry",
    skip_bad_rows: SkipBadRows = False,
    as_json: AsJson = False,
) -> None:
    """Score a registered version on a split.

    Loads its files afresh; nothing is taken from what was recorded.
    """

    def work() -> Any:
        from banjoray.training.run import score as run

        return run(reference, split, registry, skip_bad_rows, saying(terminal()))

    result = quietly(work)
    if not result.same_data:
        terminal().print("the data has changed since this version was trained", style="yellow")
    from banjoray.reports.tables import score_tables

    told = f"{result.version} on {result.split}: {metrics_text(result.score.metrics)}"
    answer(result.to_json(), as_json, told, *score_tables(result.score))


@app.command()
def predict(
    reference: Reference,
    file: Annotated[str, typer.Argument(help="jsonl, txt, csv or parquet; a path or fsspec URL.", show_default=False)],
    output: Annotated[str, typer.Option("--output", "-o", help="Where a JSON line per row goes.", show_default=False)],
    parameters: Annotated[str, typer.Option(help="Parameters of a request, as JSON.")] = "{}",
    registry: RegistryRoot = "./registry",
    as_json: AsJson = False,
) -> None:
    """Answer every row of a file.

    As the endpoint would: the same task, the same answers. A row that can't be answered is written with its error.
    """
    try:
        given = json.loads(parameters)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--parameters: not JSON ({error})") from None
    if not isinstance(given, dict):
        raise ConfigError(f"--parameters: found {parameters}; needed a JSON object")

    def work() -> Any:
        from banjoray.serving.batch import predict as run

        return run(reference, file, output, registry, given, saying(terminal()))

    result = quietly(work)
    for line in result.first_errors:
        saying(terminal())(line)
    answer(result.to_json(), as_json, f"{result.output}  {result.rows} rows, {result.failed} of them with an error")


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="One model; all if not given.")] = None,
    registry: RegistryRoot = "./registry",
    as_json: AsJson = False,
) -> None:
    """List registered versions and aliases."""
    from banjoray.registry import Registry
    from banjoray.reports.tables import versions_table

    store = Registry(registry)
    names = [name] if name else store.models()
    listed = {model: (store.versions(model), store.aliases(model)) for model in names}
    told = {
        model: {"versions": [version.to_json() for version in versions], "aliases": aliases}
        for model, (versions, aliases) in listed.items()
    }
    lines: list[RenderableType] = [versions_table(versions, aliases) for versions, aliases in listed.values()]
    answer(told, as_json, *(lines or [f"no models in {store.root}; banjoray train makes one"]))


@app.command()
def promote(
    reference: Reference,
    alias: Annotated[str, typer.Argument(help="The alias that shall point at it, as production.", show_default=False)],
    expected: Annotated[
        int | None, typer.Option(help="Only if the alias still points at this version; 0: only if there is none.")
    ] = None,
    registry: RegistryRoot = "./registry",
    as_json: AsJson = False,
) -> None:
    """Point an alias at a version.

    What is served follows at the next start; banjoray deploy changes a running endpoint.
    """
    from banjoray.registry import Registry

    store = Registry(registry)
    version = store.resolve(reference)
    before = store.promote(version.model, version.version, alias, "anything" if expected is None else expected or None)
    told = {"model": version.model, "alias": alias, "version": version.version, "before": before}
    answer(told, as_json, f"{version.model}@{alias} is {version} (before: {before or 'nothing'})")


@app.command()
def submit(
    file: JobFile,
    address: Annotated[str, typer.Option(help="The Ray cluster's job server.")] = "http://127.0.0.1:8265",
    verb: Annotated[str, typer.Option(help="train or tune.")] = "train",
    values: Overrides = [],  # noqa: B006
) -> None:
    """Run train or tune as a Ray job.

    The working directory goes to the cluster; the job's log comes here, and its exit code is this command's.
    """
    if verb not in ("train", "tune"):
        raise ConfigError(f"--verb: found '{verb}'; needed train or tune")
    lines: list[str] = []

    def tell(text: str) -> None:
        sys.stderr.write(text)
        lines.append(text)

    def work() -> int:
        from banjoray.cluster.submit import submit as run

        return run(verb, str(file), address, values, tell)

    code = quietly(work)
    answers = [line for line in "".join(lines).splitlines() if line.startswith("{") and line.endswith("}")]
    if answers:
        typer.echo(answers[-1])
    raise typer.Exit(code)


app.add_typer(keys, name="keys", help="Make and revoke API keys of an endpoint.")

for verb in (serve, deploy, rollback, check, plan, data, inspect):
    app.command()(verb)


@app.command()
def quickstart(
    port: Annotated[int, typer.Option(help="Where to serve; another free port is taken if it is in use.")] = 8000,
) -> None:
    """See it all work here, offline.

    Trains on 600 sentences with two workers, scores, registers, serves, asks three questions.
    """
    console = terminal()
    from banjoray.quickstart import run

    quietly(lambda: run(console, port))


app.command()(schema)


if __name__ == "__main__":
    main()
