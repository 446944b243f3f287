"""The verbs about endpoints: serve, deploy, rollback, keys."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from banjoray.errors import ConfigError
from banjoray.terminal import AsJson, Reference, answer, quietly, saying, terminal

if TYPE_CHECKING:
    from banjoray.cluster.deploy import Deployed

Application = Annotated[str | None, typer.Option("--app", help="The application, where several serve the model.")]
Address = Annotated[str, typer.Option(help="A running Ray; auto: the one on this machine, or what RAY_ADDRESS names.")]


def serve(
    file: Annotated[Path, typer.Argument(help="A Ray Serve config file.", show_default=False)],
    port: Annotated[int | None, typer.Option(help="Instead of the file's port (8000 if it has none).")] = None,
) -> None:
    """Serve a config file here until Ctrl-C.

    Listens on 127.0.0.1 unless the file names another host.
    """
    console = terminal()

    def work() -> None:
        from banjoray.serving.app import serving

        with serving(file, port, saying(console)) as url:
            saying(console)(f"answering at {url} (try it at {url}/ui, docs at {url}/docs); Ctrl-C stops it")
            signal.pause()

    quietly(work)


def deploy(
    reference: Reference,
    share: Annotated[
        float | None, typer.Option(min=0, max=1, help="As a candidate, for this share of requests; 0.1 is a tenth.")
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="As a shadow: answers nobody, differences are counted.")
    ] = False,
    max_drop: Annotated[
        float | None, typer.Option(min=0, help="How much worse its metric may be than production's (0.02).")
    ] = None,
    max_slowdown: Annotated[
        float | None, typer.Option(min=0, help="How many times as long its passes may take (1.5).")
    ] = None,
    application: Application = None,
    address: Address = "auto",
    as_json: AsJson = False,
) -> None:
    """Let a running endpoint answer with a version.

    Nothing is restarted. Every replica loads it beside what answers and compares the two on the probe rows; one that is
    worse, slower or broken is refused, with the reason, and gets no request. The version before stays loaded for a
    rollback.
    """
    if shadow and share is not None:
        raise ConfigError("--shadow and --share: found both; a shadow answers nobody")
    role = "shadow" if shadow else "production" if share is None else "candidate"
    gate = {key: value for key, value in (("max_drop", max_drop), ("max_slowdown", max_slowdown)) if value is not None}
    change: dict[str, Any] = {"gate": gate} if gate else {}
    if share is not None:
        change["traffic"] = {"production": 1 - share, "candidate": share}
    console = terminal()

    def work() -> "Deployed":
        from banjoray.cluster.deploy import deploy as run

        return run(reference, role, change, (address, application), saying(console))

    _tell(quietly(work), as_json)


def rollback(
    model: Annotated[str, typer.Argument(help="The model's name, as emotion.", show_default=False)],
    application: Application = None,
    address: Address = "auto",
    as_json: AsJson = False,
) -> None:
    """Take the last deploy back.

    A candidate, where there is one, gets no more requests; else the version before answers again, which is loaded.
    """

    def work() -> "Deployed":
        from banjoray.cluster.deploy import rollback as run

        return run(model, (address, application))

    _tell(quietly(work), as_json)


def _tell(found: "Deployed", as_json: bool) -> None:
    from banjoray.reports.tables import deployed_lines

    answer(found.to_json(), as_json, *deployed_lines(found))


keys = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
KeyName = Annotated[str, typer.Argument(help="Whose key it is.", show_default=False)]
KeyFile = Annotated[Path, typer.Option("--file", help="The file that a serve config names as args.api_keys.")]


@keys.command("new")
def new_key(name: KeyName, file: KeyFile = Path("keys.yaml"), as_json: AsJson = False) -> None:
    """Make a key and print it, once; the file keeps its hash."""
    from banjoray.serving.security import add_key

    key = add_key(file, name)
    answer({"name": name, "key": key, "file": str(file)}, as_json, key)


@keys.command("revoke")
def revoke(name: KeyName, file: KeyFile = Path("keys.yaml"), as_json: AsJson = False) -> None:
    """Take a key out of the file; endpoints notice within seconds."""
    from banjoray.serving.security import revoke_key

    revoke_key(file, name)
    answer({"name": name, "file": str(file)}, as_json, f"{name} has no key in {file} any more")
