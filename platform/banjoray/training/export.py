"""From a checkpoint to a folder that `from_pretrained` reads."""

import shutil
from pathlib import Path
from typing import Any

from banjoray.config.job import JobConfig
from banjoray.errors import TrainingFailed
from banjoray.tasks.generation import set_generation
from banjoray.tasks.task import task_for
from banjoray.training.checkpoints import Checkpoint
from banjoray.training.learned import Learned, digest, load


def export(job: JobConfig, model: Any, tokenizer: Any, checkpoint: Checkpoint, files: Path, folder: Path) -> None:
    """Write the whole model of a checkpoint, whose files are in ``files``, with its tokenizer and the resolved job.

    ``model`` is a fresh one, as training starts from. Adapters are merged into the weights; with ``adapter.merge``
    false they are written beside them too. Raises TrainingFailed if frozen weights are not what they were in training.
    """
    frozen = Learned.of(model, None).frozen
    load(model, files, None, checkpoint.position.decay)
    parameters = dict(model.named_parameters())
    found = digest({name: parameters[name].detach() for name in frozen})
    if found != checkpoint.frozen:
        raise TrainingFailed(
            f"{checkpoint.name}: the frozen weights of {job.model.base} have sha256 {found[:12]}, in training they had "
            f"{checkpoint.frozen[:12]}; the base model was changed since. Train again."
        )
    staging = folder.with_name(f".staging-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    if job.adapter:
        from banjoray.models.adapters import merge, save_adapter

        if not job.adapter.merge:
            save_adapter(model, staging / "adapter", job.model.base)
        merge(model)
    if checkpoint.thresholds:
        # Beside id2label, where whoever reads the labels finds them.
        model.config.thresholds = checkpoint.thresholds
    save_model(model, tokenizer, job, staging)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def save_model(model: Any, tokenizer: Any, job: JobConfig, folder: Path) -> None:
    """A folder that `from_pretrained` reads, with the resolved job beside the weights."""
    import yaml

    if task_for(job.task).generates:
        set_generation(model, tokenizer, job)
    model.save_pretrained(folder)
    if tokenizer.is_fast:
        # Where it cut rows would be saved with it if it made the tokens, but not if they came from the cache.
        tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    (folder / "job.yaml").write_text(yaml.safe_dump(job.to_json(), sort_keys=False), encoding="utf-8")
