"""The CPU tests' paths on a CUDA device; skipped where there is none."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from banjoray.training.compatibility import cells, refusals
from banjoray.training.run import train
from banjoray.training.scoring import score_folder
from cells import Told, case_of, run_cases
from factories import make_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CELLS = {case_of(cell).name: case_of(cell) for cell in cells() if cell.device == "gpu" and not refusals(cell)}


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Told]:
    """Every cell, by its name."""
    return run_cases(tmp_path_factory.mktemp("cells"), CELLS.values(), workers=1)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_a_run_on_a_gpu_picks_its_precision_and_scores_the_same_on_the_cpu(strategy: str, tmp_path: Path) -> None:
    job = make_job(tmp_path, scale__gpus_per_worker=1, scale__strategy=strategy, train__precision="auto")
    told: list[str] = []
    result = train(job, watch=lambda moment: told.append(moment.note))
    assert any("precision bf16" in note or "precision fp16" in note for note in told)
    on_cpu = job.with_values({"scale.gpus_per_worker": 0})
    score, _ = score_folder(Path(result.checkpoint), on_cpu, "validation")
    assert score.metrics["loss"] == pytest.approx(result.metrics["loss"], abs=2e-3)


# The first of them waits for all: hundreds of short runs, one after the other.
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CELLS)
def test_an_allowed_cell_trains_what_it_should_and_as_ddp_does(tried: Mapping[str, Told], name: str) -> None:
    if tried[name].missing:
        pytest.skip(tried[name].missing)
    assert tried[name].complaints(CELLS[name]) == []
