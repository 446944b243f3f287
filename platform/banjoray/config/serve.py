"""The ``args`` of an application in a serve config: which model answers, and within what limits."""

from typing import Literal

from pydantic import Field

from banjoray.config.section import Section


class ServeConfig(Section):
    """What one application serves."""

    model: str = Field(description="name@version or name@alias, as emotion@production.")
    registry: str = Field("./registry", description="Folder or fsspec URL of the registry.")
    engine: Literal["auto", "torch", "onnx"] = Field(
        "auto", description="What computes; auto: the fastest whose answers agree with torch in fp32 on the probe rows."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        "auto", description="Of the weights; int8 is onnx's, bf16 torch's, fp16 torch's on a GPU; auto as for engine."
    )
    latency_target_ms: float = Field(
        20.0,
        gt=0,
        description="Predicted time of a forward pass up to which waiting rows join it; a row alone may take longer.",
    )
    max_batch_tokens: int = Field(
        4096, ge=16, description="Rows x longest row of one forward pass; longer queues wait for the next pass."
    )
    max_rows: int = Field(256, ge=1, description="Rows in one request; more are refused with 413.")
    max_body_mib: float = Field(4.0, gt=0, description="Size of a request body; more is refused with 413.")
