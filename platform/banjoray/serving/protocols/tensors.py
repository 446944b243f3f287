"""Tensors of the Open Inference Protocol: texts in, texts and numbers out, as JSON or as binary data after it.

An element of a binary BYTES tensor is its length, 4 bytes, and its bytes; all numbers are little-endian.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from fastapi import Response
from fastapi.responses import JSONResponse

from banjoray.errors import RequestError

Tensor = list[str] | np.ndarray
"""Texts (BYTES), or numbers (FP32)."""


def header_length(declared: str | None, whole: int) -> int:
    """How many bytes of a body of ``whole`` are JSON; raises RequestError: a header that can't be."""
    if declared is None:
        return whole
    if not (declared.isascii() and declared.isdecimal() and len(declared) < 12 and int(declared) <= whole):
        raise RequestError(
            f"Inference-Header-Content-Length: found {declared!r:.40}; needed bytes of JSON, of the body's {whole}", 400
        )
    return int(declared)


def read_tensors(found: Any, binary: bytes, most: int) -> dict[str, list[str]]:
    """Name -> texts of a request's tensors; ``binary`` is what follows the JSON, all of which has to belong to one.

    Raises RequestError: another type than BYTES, a shape that does not fit, more than ``most`` rows (413).
    """
    if not isinstance(found, list) or not found:
        raise RequestError(f"inputs: found {type(found).__name__}; needed a list with a tensor or more")
    tensors: dict[str, list[str]] = {}
    for place, tensor in enumerate(found):
        where = f"inputs[{place}]"
        if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str) or tensor["name"] in tensors:
            raise RequestError(f"{where}: needed an object with a name of its own, a shape and a datatype")
        if tensor.get("datatype") != "BYTES":
            raise RequestError(f"{where}.datatype: found {tensor.get('datatype')!r:.40}; needed BYTES")
        rows = _rows(tensor.get("shape"), where, most)
        parameters = tensor.get("parameters") or {}
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else parameters
        if size is None:
            texts = _listed(tensor.get("data"), where)
        else:
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(binary):
                raise RequestError(f"{where}.parameters.binary_data_size: found {size!r:.40}; {len(binary)} bytes left")
            texts, binary = _unpacked(binary[:size], where), binary[size:]
        if len(texts) != rows:
            raise RequestError(f"{where}: found {len(texts)} elements; its shape says {rows}")
        tensors[tensor["name"]] = texts
    if binary:
        raise RequestError(f"inputs: found {len(binary)} bytes of binary data that belong to no tensor")
    return tensors


def packed(head: Mapping[str, Any], outputs: Mapping[str, tuple[Tensor, bool]], headers: Mapping[str, str]) -> Response:
    """A response of some outputs; those whose flag is true are binary data after the JSON."""
    told, binary = [], bytearray()
    for name, (tensor, apart) in outputs.items():
        numbers = isinstance(tensor, np.ndarray)
        shape = list(tensor.shape) if isinstance(tensor, np.ndarray) else [len(tensor)]
        output: dict[str, Any] = {"name": name, "datatype": "FP32" if numbers else "BYTES", "shape": shape}
        if apart:
            cells = tensor.tobytes() if isinstance(tensor, np.ndarray) else b"".join(map(_element, tensor))
            output["parameters"] = {"binary_data_size": len(cells)}
            binary += cells
        else:
            output["data"] = tensor.ravel().tolist() if isinstance(tensor, np.ndarray) else tensor
        told.append(output)
    body = dict(head) | {"outputs": told}
    if not any(apart for _, apart in outputs.values()):
        return JSONResponse(body, headers=headers)
    start = json.dumps(body, allow_nan=False).encode("ascii")
    length = {"Inference-Header-Content-Length": str(len(start))}
    return Response(start + bytes(binary), headers=dict(headers) | length, media_type="application/octet-stream")


def _rows(shape: Any, where: str, most: int) -> int:
    """The rows of a shape [rows] or [rows, 1]."""
    fits = isinstance(shape, list) and len(shape) in (1, 2) and (len(shape) == 1 or shape[1] == 1)
    if not fits or not isinstance(shape[0], int) or isinstance(shape[0], bool) or shape[0] < 1:
        raise RequestError(f"{where}.shape: found {shape!r:.100}; needed [rows] or [rows, 1]")
    if shape[0] > most:
        raise RequestError(f"{where}: found {shape[0]} rows; this endpoint takes {most} in one request", 413)
    return int(shape[0])


def _listed(data: Any, where: str) -> list[str]:
    """The texts of a tensor's data, flat or a list per row."""
    if isinstance(data, list) and all(isinstance(cell, list) for cell in data):
        data = [cell for row in data for cell in row]
    if not isinstance(data, list) or not all(isinstance(cell, str) for cell in data):
        raise RequestError(f"{where}.data: needed a list of texts, or binary data")
    return data


def _unpacked(data: bytes, where: str) -> list[str]:
    texts: list[str] = []
    place = 0
    while place < len(data):
        (length,) = struct.unpack_from("<I", data, place) if place + 4 <= len(data) else (len(data),)
        place += 4
        if place + length > len(data):
            raise RequestError(f"{where}: its binary data breaks off inside of element {len(texts)}")
        try:
            texts.append(data[place : place + length].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RequestError(f"{where}: element {len(texts)} is not UTF-8 (byte {error.start + 1} of it)") from None
        place += length
    return texts


def _element(text: str) -> bytes:
    cell = text.encode("utf-8")
    return struct.pack("<I", len(cell)) + cell
