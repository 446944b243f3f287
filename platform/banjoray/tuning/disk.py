"""How much disk the trials of a study may take, and who makes room.

The budget is cut into equal shares: one for every trial that runs, one for all that are done. A running trial stays
within its share by `train.checkpoint_budget_gib`; when it ends, it keeps its best checkpoint and its last, and the
worst of those that are done give theirs up until the rest fits.
"""

from collections.abc import Mapping

from banjoray.config.job import JobConfig
from banjoray.errors import ConfigError
from banjoray.training.checkpoints import Store


def shared(job: JobConfig, at_once: int) -> JobConfig:
    """The job of a trial, its checkpoints within its share; raises ConfigError where it asks for more itself."""
    budget = job.tune.disk_budget_gib if job.tune else None
    if budget is None:
        return job
    share = budget / (at_once + 1)
    asked = job.train.checkpoint_budget_gib
    if asked is not None and asked > share:
        raise ConfigError(
            f"train.checkpoint_budget_gib: found {asked:g}; tune.disk_budget_gib {budget:g} leaves {share:.3g} for "
            f"each of {at_once} trials at once and for those that are done; leave it out, or raise tune.disk_budget_gib"
        )
    return job.with_values({"train.checkpoint_budget_gib": share if asked is None else asked})


class Janitor:
    """Keeps what finished trials leave within their share; ``freed`` counts bytes."""

    def __init__(self, job: JobConfig, at_once: int) -> None:
        self._metric, self._mode = job.train.metric, job.train.mode
        budget = job.tune.disk_budget_gib if job.tune else None
        self._share = None if budget is None else int(budget * 2**30 / (at_once + 1))
        self.freed = 0

    def tidy(self, folders: Mapping[str, str]) -> None:
        """Of all finished trials (name -> folder or URL): the best checkpoint of each and its last, if all fit.

        Else whole trials go, the worst first; of the best one the best checkpoint stays in any case.
        """
        sign = 1 if self._mode == "max" else -1
        scores: dict[str, float] = {}
        sizes: dict[str, int] = {}
        for trial, folder in folders.items():
            store = Store(folder, lambda line: None)
            best = store.best(self._metric, self._mode)
            kept = {checkpoint.name: checkpoint for checkpoint in (best, *store.all()[-1:]) if checkpoint}
            self.freed += store.keep_only(kept.values())
            if best is not None:
                scores[trial], sizes[trial] = sign * best.metrics[self._metric], store.size(*kept.values())
        ranked = sorted(scores, key=scores.__getitem__)
        for trial in ranked:
            if self._share is None or sum(sizes.values()) <= self._share:
                return
            store = Store(folders[trial], lambda line: None)
            best = store.best(self._metric, self._mode) if trial == ranked[-1] else None
            self.freed += store.keep_only([best] if best else [])
            sizes[trial] = store.size(best) if best else 0
