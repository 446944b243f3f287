"""The ``args`` of an application in a serve config: which models answer, and within what limits."""

from typing import Literal, Self

from pydantic import Field, model_validator

from banjoray.config.section import Section


class ServeConfig(Section):
    """What one application serves."""

    model: str | None = Field(None, description="name@version or name@alias, as emotion@production.")
    models: tuple[str, ...] = Field(
        (),
        description="Several of them instead, each of another name; all are loaded into every replica, and what they "
        "have in common from the bottom up is held and computed once.",
    )
    registry: str = Field("./registry", description="Folder or fsspec URL of the registry.")
    engine: Literal["auto", "torch", "onnx"] = Field(
        "auto", description="What computes; auto: the fastest whose answers agree with torch in fp32 on the probe rows."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        "auto", description="Of the weights; int8 is onnx's, bf16 torch's, fp16 torch's on a GPU; auto as for engine."
    )
    latency_target_ms: float | None = Field(
        None,
        gt=0,
        description="A request whose wait for those before it is predicted to be longer is refused with 429 and "
        "Retry-After, so that one that takes no longer by itself is answered within twice the target. If absent: 1000, "
        "for models that write texts timeout_s.",
    )
    pass_target_ms: float = Field(
        20.0,
        gt=0,
        description="Predicted time of a forward pass up to which waiting rows join it; a row alone may take longer.",
    )
    max_batch_tokens: int = Field(
        4096, ge=16, description="Rows x longest row of one forward pass; longer queues wait for the next pass."
    )
    max_rows: int = Field(256, ge=1, description="Rows in one request; more are refused with 413.")
    max_body_mib: float = Field(4.0, gt=0, description="Size of a request body; more is refused with 413.")
    max_tokens_per_request: int = Field(
        131_072, ge=1, description="Tokens of all rows of one request; more are refused with 413."
    )
    timeout_s: float = Field(
        60.0,
        gt=0,
        description="Time for a request inside the replica; then 504, and rows that wait are not computed. Not for "
        "streams.",
    )
    api_keys: str | None = Field(
        None,
        description="Path or fsspec URL of a file of keys (banjoray keys new), or none: no key is asked for. If "
        "absent, banjoray serve takes it as none on a loopback host; elsewhere it has to be said.",
    )
    access_log: bool = Field(True, description="Write a JSON line per request to stderr, without its texts.")
    log_texts: bool = Field(False, description="Write texts of requests, and messages of errors, to the log too.")
    playground: bool = Field(True, description="Answer GET /ui with a page to try the model in a browser.")

    @model_validator(mode="after")
    def _names(self) -> Self:
        if (self.model is None) == (not self.models):
            raise ValueError("found neither model nor models, or both; needed one of them")
        names = [reference.partition("@")[0] for reference in self.references]
        if len(set(names)) < len(names):
            raise ValueError(f"models: found {list(self.models)}; needed another name for each of them")
        return self

    @property
    def references(self) -> tuple[str, ...]:
        """What is served, one or several."""
        return self.models if self.model is None else (self.model,)
