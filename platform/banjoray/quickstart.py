"""The whole product on this machine in a few minutes: train, score, promote, serve, ask."""

import json
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

from rich.console import Console

from banjoray.config.job import JobConfig, load_job
from banjoray.registry import Registry
from banjoray.reports.progress import RunProgress
from banjoray.reports.tables import confusion_table, metrics_line
from banjoray.serving.app import serving
from banjoray.training.run import RunResult, cluster, score, train

QUESTIONS = (
    "My hands would not stop shaking when the lift dropped.",
    "She kept every letter he ever sent her in a shoebox under the bed.",
    "Nobody told me there would be cake, and it isn't even my birthday!",
)


def run(console: Console, port: int) -> None:
    """Run the quickstart in the working directory; everything that it starts is stopped at the end."""
    began = time.monotonic()
    job_file, serve_file = shipped("jobs/quickstart.yaml"), shipped("serve_configs/quickstart.yaml")
    job = load_job(job_file)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    say("banjoray quickstart: one job file, from raw text to an HTTP answer. Nothing leaves this machine.")
    with cluster(job, say):
        _title(console, "train", f"the job is {job_file}")
        result = _train(console, job, say)
        _title(console, "score", "on 60 sentences that training never saw")
        _score(console, job, result)
        _title(console, "serve", f"the config is {serve_file}")
        before = Registry(job.registry.root).promote(job.model_name, _number(result), "production")
        say(f"  {job.model_name}@production is {result.version} now (before: {before or 'nothing'})")
        with serving(serve_file, _free(port), lambda line: say(f"  {line}")) as url:
            _ask(console, f"{url}/models/{job.model_name}")
    _title(console, "next", f"all of this took {time.monotonic() - began:.0f} s; everything is stopped again")
    _next(say, job, result)


def shipped(path: str) -> Path:
    """A file that comes with banjoray: beside the sources, or inside an installed package."""
    packaged = Path(__file__).parent / "shipped" / path
    return packaged if packaged.exists() else Path(__file__).parents[2] / path


def _title(console: Console, verb: str, told: str) -> None:
    console.print(f"\n[bold]{verb}[/bold]  {told}", highlight=False)


def _train(console: Console, job: JobConfig, say: Any) -> RunResult:
    progress = RunProgress(console)
    with progress.shown():
        result = train(job, watch=progress, say=lambda line: say(f"  {line}"))
    say(f"  {result.steps} steps in {result.seconds:.0f} s; best epoch on validation: {metrics_line(result.metrics)}")
    say(f"  registered as {result.version}, after loading the files afresh and scoring them again")
    return result


def _score(console: Console, job: JobConfig, result: RunResult) -> None:
    found = score(result.version, "test", job.registry.root).score
    console.print(f"  {metrics_line(found.metrics)}", highlight=False)
    console.print(confusion_table(found))


def _ask(console: Console, url: str) -> None:
    console.print(f"  POST {url}", highlight=False, markup=False)
    for question in QUESTIONS:
        body = json.dumps({"inputs": question, "parameters": {"top_k": 2}}).encode()
        request = urllib.request.Request(url, body, {"content-type": "application/json"})
        began = time.perf_counter()
        with urllib.request.urlopen(request, timeout=30) as response:
            first, second = json.load(response)[0]
            version = response.headers["x-model-version"]
        took = (time.perf_counter() - began) * 1000
        console.print(f'    "{question}"', highlight=False, markup=False)
        told = f"      {first['label']} {first['score']:.2f}  (then {second['label']} {second['score']:.2f})"
        console.print(f"{told}  [dim]{version}, {took:.0f} ms[/dim]", highlight=False)


def _next(say: Any, job: JobConfig, result: RunResult) -> None:
    say(f"  the model is a plain Hugging Face folder: {job.registry.root}/{job.model_name}/{_number(result)}")
    say("  banjoray serve serve_configs/quickstart.yaml     serve it again, until Ctrl-C")
    say("  banjoray tune jobs/tune_quickstart.yaml          search learning rate and freezing")
    say("  your own rows, with columns text and label:")
    say("    banjoray train jobs/quickstart.yaml --set name=mine \\")
    say("      --set data.source=null --set data.files.train=rows.csv")


def _number(result: RunResult) -> int:
    return int(result.version.partition("@")[2])


def _free(port: int) -> int:
    """``port``, or another one that is free."""
    for candidate in (port, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError("no free port on 127.0.0.1")
