"""The ``tune`` section of a job file: what is searched, how, how long, and what stops a trial early."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from banjoray.config.section import Section


class Dimension(Section):
    """Where the value of one key comes from: exactly one of the three."""

    loguniform: tuple[float, float] | None = Field(None, description="Lowest and highest value, drawn on a log scale.")
    uniform: tuple[float, float] | None = Field(None, description="Lowest and highest value, drawn evenly.")
    choice: Annotated[list[Any], Field(min_length=1)] | None = Field(None, description="The values to pick from.")

    @model_validator(mode="after")
    def _one_range(self) -> "Dimension":
        given = [key for key in type(self).model_fields if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"needs one of loguniform, uniform and choice, found {' and '.join(given) or 'none'}")
        bounds = self.loguniform or self.uniform
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError(f"{given[0]} needs low < high, found {list(bounds)}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform needs values above 0, found {list(self.loguniform)}")
        return self


class SearchConfig(Section):
    """What ``banjoray tune`` searches. Trials are compared by train.metric and train.mode."""

    space: dict[str, Dimension] = Field(
        min_length=1,
        description="Dotted key of the job file -> where its value comes from: loguniform, uniform or choice.",
    )
    trials: int | None = Field(
        None, ge=1, description="How many points of the space are tried; null: 8, with grid every combination."
    )
    searcher: Literal["random", "grid", "optuna"] = Field(
        "random", description="random; grid: every combination of choices; optuna: TPE, learns from finished trials."
    )
    scheduler: Literal["none", "asha", "median"] = Field(
        "asha",
        description="asha stops trials that fall behind after an epoch; median those below the median of the others; "
        "none runs every trial to its end.",
    )
    concurrent: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Trials that run at the same time; auto: as many as the cluster's CPUs and GPUs hold."
    )
    time_budget_s: float | None = Field(
        None, gt=0, description="No trial goes on after so long; the best so far is registered."
    )
    disk_budget_gib: float | None = Field(
        None, gt=0, description="Disk space of the checkpoints of all trials; the worst finished ones make room."
    )

    @model_validator(mode="after")
    def _grid_has_corners(self) -> "SearchConfig":
        if self.searcher != "grid":
            return self
        ranges = [key for key, dimension in self.space.items() if dimension.choice is None]
        if ranges:
            raise ValueError(f"searcher grid needs a choice for every key; found a range for {', '.join(ranges)}")
        if self.trials is not None and self.trials != self.points:
            raise ValueError(f"trials: found {self.trials} with searcher grid, which tries all {self.points} points")
        return self

    @property
    def points(self) -> int:
        """How many trials there are."""
        if self.searcher == "grid":
            return math.prod(len(dimension.choice or ()) for dimension in self.space.values())
        return self.trials or 8
