"""The ``tune`` section of a job file: what is searched, how long, and what stops a trial early."""

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
    """What ``banjoray tune`` searches."""

    space: dict[str, Dimension] = Field(
        min_length=1,
        description="Dotted key of the job file -> where its value comes from: loguniform, uniform or choice.",
    )
    trials: int = Field(8, ge=1, description="How many points of the space are tried; each trial is one run.")
    scheduler: Literal["none", "asha"] = Field(
        "asha", description="asha stops trials that fall behind after an epoch; none runs every trial to its end."
    )
    concurrent: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Trials that run at the same time; auto: as many as the cluster's CPUs and GPUs hold."
    )
