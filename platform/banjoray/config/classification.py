"""What text-classification finds of a text: one of some labels, any of them, or a number."""

from typing import Literal

from pydantic import Field

from banjoray.config.section import Section


class ClassificationConfig(Section):
    """What the label of a row of text-classification is."""

    problem_type: Literal["single_label", "multi_label", "regression"] = Field(
        "single_label",
        description="single_label: one label; multi_label: a list of any number of them, each with a threshold that is "
        "chosen on the validation rows; regression: a number.",
    )
