"""What a search finds: the best of a few trials over freezing and learning rate, beside one run by the defaults.

    python -m benchmarks.search_gain --train rows.jsonl --validation rows.jsonl --name mrpc

Files are JSON Lines with columns sentence1, sentence2 and label. Both are commands of a user, `banjoray tune` and
`banjoray train` with the same job file; one trial per core, ASHA. No time is told. Results go to benchmarks/results,
the picture to docs/search_NAME.svg, and the results, as one JSON line, to stdout; progress goes to stderr.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from benchmarks.search_contenders import ROOT
from benchmarks.train_throughput import PACKAGES, machine

from banjoray.reports.study import study_picture
from banjoray.tuning.study import StudyResult, Trial

SEARCH: dict[str, Any] = {
    "trials": 6,
    "scheduler": "asha",
    "space": {
        "train.learning_rate": {"loguniform": [5.0e-5, 6.0e-4]},
        "freeze": {"choice": ["none", {"layers": 2}, {"layers": 4}]},
    },
}


def main() -> None:
    """Search, train once by the defaults, write."""
    options = parsed()
    files = {split: str(Path(getattr(options, split)).absolute()) for split in ("train", "validation")}
    job = {
        "name": options.name,
        "task": "text-classification",
        "model": {"base": "banjoray:minilm"},
        "data": {"files": files, "columns": {"text": "sentence1", "text_pair": "sentence2", "label": "label"}},
        "scale": {"cpus_per_worker": 1},
        "tune": SEARCH,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
        study = said(["tune", "job.yaml"], folder)
        usual = said(["train", "job.yaml", "--set", "name=usual"], folder)
    rows = {split: len(Path(path).read_text(encoding="utf-8").splitlines()) for split, path in files.items()}
    result = facts(options.name, rows) | told(study, usual)
    path = ROOT / "benchmarks" / "results" / f"search_gain_{options.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (ROOT / "docs" / f"search_{options.name}.svg").write_text(picture(study), encoding="utf-8")
    print(json.dumps(result))


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="JSON Lines file")
    parser.add_argument("--validation", required=True, help="JSON Lines file")
    parser.add_argument("--name", required=True, help="what the results call the data")
    return parser.parse_args()


def said(arguments: list[str], folder: str) -> dict[str, Any]:
    """What a command of banjoray says in JSON; its progress goes to stderr as it comes."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(Path(sys.executable).parent / "banjoray"), *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True, cwd=folder)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def told(study: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """Of the study every trial, best first; of the run by the defaults its scores."""
    keys = ("values", "status", "epochs", "score", "prefix")
    return {
        "metric": study["metric"],
        "score": study["score"],
        "trials": [{key: trial[key] for key in keys} for trial in study["trials"]],
        "importances": study["importances"],
        "default": usual["metrics"],
    }


def picture(study: dict[str, Any]) -> str:
    """The parallel coordinates of a study as an SVG file."""
    trials = tuple(Trial(**trial | {"history": tuple(trial["history"])}) for trial in study["trials"])
    return study_picture(StudyResult(**study | {"trials": trials}))


def facts(name: str, rows: dict[str, int]) -> dict[str, Any]:
    """What was measured, on what, with which versions."""
    described = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(described, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    return {
        "benchmark": "search_gain",
        "name": name,
        "data": f"{name}, {rows['train']} train and {rows['validation']} validation pairs, MiniLM",
        "machine": machine(gpu=False),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit,
        "search": SEARCH,
    }


if __name__ == "__main__":
    main()
