"""The section of a job file that says how a trained model writes text."""

from pydantic import Field, model_validator

from banjoray.config.section import Section

# Read by sampling alone, and by beam search alone.
SAMPLING = ("temperature", "top_k", "top_p")
BEAMS = ("length_penalty", "early_stopping")


class GenerationConfig(Section):
    """How text is written, where a request does not ask for something else; null: as the base model does.

    Saved with every version, in generation_config.json too. Keys are transformers' names.
    """

    max_new_tokens: int = Field(128, ge=1, description="Tokens that are written at most.")
    min_new_tokens: int | None = Field(None, ge=0, description="Tokens before the text may end.")
    num_beams: int | None = Field(
        None, ge=1, le=16, description="Beams of the search; 1: the likeliest token each time."
    )
    length_penalty: float | None = Field(
        None, description="Beams are ranked by log-probability / length ** this; above 0 favours long texts."
    )
    early_stopping: bool | None = Field(None, description="End a beam search as soon as every beam has ended.")
    no_repeat_ngram_size: int | None = Field(
        None, ge=0, description="No run of so many tokens is written twice; 0: any."
    )
    repetition_penalty: float | None = Field(
        None, gt=0, description="Scores of tokens that are there already are divided by this (arXiv:1909.05858)."
    )
    do_sample: bool | None = Field(None, description="Draw tokens instead of taking the likeliest.")
    temperature: float | None = Field(None, gt=0, description="Logits are divided by this; needs do_sample.")
    top_k: int | None = Field(None, ge=0, description="Only the so many likeliest tokens are drawn; needs do_sample.")
    top_p: float | None = Field(
        None, gt=0, le=1, description="Only the likeliest tokens of this share together are drawn; needs do_sample."
    )

    @model_validator(mode="after")
    def _sampling_is_on(self) -> "GenerationConfig":
        found = [key for key in SAMPLING if getattr(self, key) is not None]
        if found and not self.do_sample:
            raise ValueError(f"found {found[0]} without do_sample: true; it changes how tokens are drawn, and none are")
        if self.min_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"found min_new_tokens {self.min_new_tokens}, which is more than max_new_tokens {self.max_new_tokens}"
            )
        return self
