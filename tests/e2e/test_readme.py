"""The README's story runs as it stands, and the quickstart says what it should."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ANSWER = re.compile(r"(sadness|joy|love|anger|fear|surprise) 0\.\d\d  \(then ")


def story_blocks() -> list[str]:
    """The README's bash blocks, without the one that calls make (this test runs inside of it)."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [block for block in blocks if "make " not in block]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a fresh checkout whose .venv is the one that runs this test."""
    for name in ("jobs", "serve_configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def test_the_story_of_the_readme_runs_line_by_line(checkout: Path) -> None:
    blocks = story_blocks()
    assert len(blocks) == 2
    assert len(blocks[0].strip().splitlines()) == 12
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answered = next(line for line in done.stdout.splitlines() if line.startswith("[["))
    assert json.loads(answered[: answered.index("]]") + 2])[0][0]["label"] in done.stdout
    for told in (
        "jobs/quickstart.yaml: ok",
        "emotion@1 on test: accuracy",
        "emotion@production is emotion@1",
        "tickets@1",
    ):
        assert told in done.stdout
    assert "emotion@2" in done.stdout


def test_quickstart_ends_with_answers_a_held_out_score_and_nothing_left_running(checkout: Path) -> None:
    banjoray = str(Path(sys.executable).parent / "banjoray")
    process = subprocess.Popen(
        [banjoray, "quickstart", "--port", "0"],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    stdout, told = process.communicate(timeout=400)
    assert process.returncode == 0, told
    assert stdout == ""
    assert len(ANSWER.findall(told)) == 3
    assert "registered as emotion@1" in told
    assert re.search(r"score  on 60 sentences.*\n  accuracy 0\.\d+", told)
    assert not re.search(r"WARN|INFO|Traceback|raylet|\(pid=", told)
    # Every process of the quickstart was in its own session; what was told to end last may need a moment.
    for _ in range(100):
        left = subprocess.run(["pgrep", "-a", "-s", str(process.pid)], capture_output=True, text=True, check=False)
        if not left.stdout:
            break
        time.sleep(0.1)
    assert left.stdout == ""
