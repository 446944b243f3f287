"""What all verbs share: where progress and answers go, and where what libraries print is kept."""

import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from banjoray.errors import BanjorayError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Result = TypeVar("Result")
JobFile = Annotated[Path, typer.Argument(help="A job file, as jobs/quickstart.yaml.", show_default=False)]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the job file; may be repeated.")
]
SkipBadRows = Annotated[
    bool,
    typer.Option("--skip-bad-rows", help="Leave out, count and list rows that can't be used (data.skip_bad_rows)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Profile = Annotated[bool, typer.Option("--profile", help="Print where the time went; on GPUs it costs some.")]
RegistryRoot = Annotated[str, typer.Option("--registry", help="Folder or fsspec URL of the registry.")]
Reference = Annotated[str, typer.Argument(help="name@version or name@alias, as emotion@7.", show_default=False)]


def terminal() -> "Console":
    """Where progress goes: stderr."""
    from rich.console import Console

    # FORCE_COLOR makes Rich take a file for a terminal: colours are fine there, a table that is drawn again is not.
    return Console(stderr=True, force_interactive=None if sys.stderr.isatty() else False)


def saying(console: "Console") -> Callable[[str], None]:
    """Prints lines there, as they are."""
    return lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)


def metrics_text(metrics: dict[str, float]) -> str:
    """Metrics in one line."""
    from banjoray.reports.tables import metrics_line

    return metrics_line(metrics)


def quietly(work: Callable[[], Result]) -> Result:
    """Do the work with what Ray and other libraries print kept out of stdout and the terminal, in a log file."""
    log = Path(tempfile.gettempdir()) / f"banjoray-{os.getuid()}" / f"{os.getpid()}.log"
    log.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        with _logged_to(log):
            return work()
    except BanjorayError as error:
        if error.exit_code == 1:
            error.args = (f"{error.args[0]}\nlogs: {log}, and Ray's in /tmp/ray/session_latest/logs", *error.args[1:])
        raise


@contextlib.contextmanager
def _logged_to(log: Path) -> Iterator[None]:
    handler = logging.FileHandler(log)
    names = (
        "ray",
        "ray.serve",
        "ray.train",
        "ray.tune",
        "transformers",
        "datasets",
        "accelerate",
        "DeepSpeed",
        "huggingface_hub",
    )
    for name in names:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.propagate = False
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield


def answer(told: dict[str, Any], as_json: bool, *lines: "RenderableType") -> None:
    """Print the answer: one JSON object, or lines for people."""
    if as_json:
        typer.echo(json.dumps(told))
        return
    from rich.console import Console

    console = Console()
    for line in lines:
        console.print(line, highlight=False, soft_wrap=isinstance(line, str))


def job_of(file: Path, values: list[str], skip_bad_rows: bool) -> Any:
    """The job in a file, with --set and --skip-bad-rows applied."""
    from banjoray.config.job import load_job

    return load_job(file, [*values, *["data.skip_bad_rows=true"] * skip_bad_rows])


def write_page(path: Path, page: str) -> None:
    """A page where it was asked for; raises ConfigError if it can't be written there."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: can't be written ({error.strerror})") from None
