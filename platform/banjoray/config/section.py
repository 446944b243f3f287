"""The ground that every section of a config stands on: frozen, no unknown keys, errors that name the dotted key."""

import difflib
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from banjoray.errors import ConfigError

Config = TypeVar("Config", bound="Section")


class Section(BaseModel):
    """A group of keys; can't be changed once made and takes no key that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def validate(kind: type[Config], values: Mapping[str, Any], origin: str) -> Config:
    """A valid config of ``kind``.

    ``origin`` (a file name, say) starts every line of the error.

    Raises ConfigError: one line for each key that is wrong: its dotted path, what was found, what is needed.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(kind, problem) for problem in error.errors(include_url=False))
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from None


def _explain(kind: type[Section], problem: Any) -> str:
    """One line for one pydantic error."""
    path = _dotted(kind, problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = nearest(path, known_keys(kind))
        return f"unknown key '{path}'{f'; did you mean {near!r}?' if near else ''}"
    if problem["type"] == "missing":
        return f"key '{path}' is missing"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if problem["type"] == "value_error":
        return f"{path}: {message}" if path else message
    if problem["type"] == "string_pattern_mismatch":
        message = "letters, digits, '.', '_' and '-', a letter or digit first"
    if problem["type"] == "too_short":
        message = f"at least {problem['ctx']['min_length']} of them"
    if problem["type"] == "model_type":
        message = "keys and values"
    found = problem["input"]
    return f"{path}: found {found!r}, needed {message}"


def _dotted(kind: type[Section], location: tuple[str | int, ...]) -> str:
    """The key's dotted path; pydantic also puts names of union members into the location, which are no keys."""
    keys: list[str] = []
    current: Any = kind
    for part in location:
        fields = _fields(current)
        members = _members(current)
        if isinstance(part, str) and part not in fields and len(members) > 1:
            continue
        keys.append(str(part))
        current = fields.get(str(part))
    return ".".join(keys)


def _members(annotation: Any) -> list[Any]:
    """The kinds of value that ``annotation`` allows, None apart."""
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation]
    return [member for member in get_args(annotation) if member is not NoneType]


def _fields(annotation: Any) -> dict[str, Any]:
    """Field name -> annotation, of every section that ``annotation`` allows."""
    sections = [kind for kind in _members(annotation) if isinstance(kind, type) and issubclass(kind, Section)]
    return {name: field.annotation for section in sections for name, field in section.model_fields.items()}


def known_keys(kind: type[Section], prefix: str = "") -> list[str]:
    """Every dotted key of ``kind``, sections and leaves, in file order."""
    keys: list[str] = []
    for name, annotation in _fields(kind).items():
        keys.append(prefix + name)
        for candidate in (annotation, *get_args(annotation)):
            if isinstance(candidate, type) and issubclass(candidate, Section):
                keys.extend(known_keys(candidate, f"{prefix}{name}."))
    return keys


def nearest(path: str, keys: list[str]) -> str | None:
    """The known key that looks most like ``path``: the same last part elsewhere, or a near spelling."""
    last = path.rsplit(".", 1)[-1]
    elsewhere = [key for key in keys if key.rsplit(".", 1)[-1] == last]
    if elsewhere:
        return elsewhere[0]
    close = difflib.get_close_matches(path, keys, n=1, cutoff=0.6)
    if close:
        return close[0]
    by_last = {key.rsplit(".", 1)[-1]: key for key in keys}
    close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)
    return by_last[close[0]] if close else None
