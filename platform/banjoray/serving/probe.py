"""Whether a faster engine says what the checkpoint says, on the probe rows that were saved with a version."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from banjoray.config.job import JobConfig
from banjoray.config.metrics import MINIMISED
from banjoray.data.batches import sorted_batches
from banjoray.data.splits import Split
from banjoray.data.tokens import Tokens, tokenise
from banjoray.tasks.task import Task
from banjoray.training.scoring import EVALUATION_TOKENS, Feed, outputs

# The share of labels that have to be the same, and by how much the job's metric may be worse.
SAME, WORSE = 0.995, 0.005
# How many of the rows are timed one by one, and how many together.
ALONE, TOGETHER = 8, 16


@dataclass(frozen=True)
class Probe:
    """The probe rows of a version, tokenised; ``metric`` is the one that picked its checkpoint."""

    task: Task
    rows: Split
    tokens: Tokens
    labels: tuple[str, ...]
    metric: str
    feed: Feed

    def outputs(self, model: Callable[..., Any]) -> list[np.ndarray]:
        """What the task keeps of a model's outputs for every feature, as an evaluation does."""
        return outputs(model, self.feed, self.task)

    def pass_over(self, model: Callable[..., Any]) -> None:
        """What is timed: passes over the first rows, some of them alone and all of them in batches of like lengths."""
        lengths = self.tokens.lengths[:TOGETHER]
        alone = [np.array([row]) for row in range(min(ALONE, len(lengths)))]
        with torch.inference_mode():
            for batch in (*alone, *sorted_batches(lengths, EVALUATION_TOKENS[self.feed.device.type])):
                inputs, targets = self.feed.batch(batch)
                # As in an answer, where there are no targets; what a text is worth is only known beside its own.
                told = torch.from_numpy(targets).to(self.feed.device) if self.task.generates else None
                self.task.kept(model(**inputs), inputs, told)

    def disagreement(
        self, found: Sequence[np.ndarray], wanted: Sequence[np.ndarray], judges: slice = slice(None)
    ) -> str:
        """What is wrong with outputs ``found`` where torch in fp32 gave ``wanted``, in words; empty: nothing.

        Labels are compared for the features in ``judges``.
        """
        pairs = zip(found[judges], wanted[judges], strict=True)
        same = np.concatenate([self.task.same(one, other) for one, other in pairs])
        if same.mean() < SAME:
            return f"{same.mean():.1%} of {len(same)} answers are those of fp32, needed {SAME:.1%}"
        scores = [self.task.score(each, self.tokens, self.rows, self.labels).metrics for each in (found, wanted)]
        mine, plain = (score[self.metric] for score in scores)
        # Of a metric that can be above 1, a share.
        margin = WORSE * max(1.0, abs(plain))
        worse = mine - plain if self.metric in MINIMISED else plain - mine
        if not worse <= margin:
            return f"{self.metric} is {mine:.4f}, in fp32 {plain:.4f}, needed a difference of at most {margin:g}"
        return ""


def probe_for(rows: Split | None, task: Task, tokenizer: Any, config: Any, job: JobConfig) -> Probe | None:
    """The probe of a version's rows for a model of its task, on the CPU or GPU that is there; None for no rows."""
    if rows is None:
        return None
    tokens = tokenise(rows, task, tokenizer, job.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    feed = Feed(tokens, tokenizer.pad_token_id, device, collate=task.collate(job, tokenizer, config))
    labels = tuple(config.id2label[number] for number in range(config.num_labels)) if task.labelled else ()
    return Probe(task, rows, tokens, labels, job.train.metric, feed)
