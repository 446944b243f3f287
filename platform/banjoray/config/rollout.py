"""Which versions of a model answer: the value of the model's name in the ``user_config`` of a deployment."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from banjoray.config.section import Section, validate
from banjoray.errors import ConfigError

_VERSION = re.compile(r"[^@]+@[1-9][0-9]*")


class Gate(Section):
    """What a version may be worse by than the one that answers, on that one's probe rows, before it is refused."""

    max_drop: float = Field(
        0.02, ge=0, description="Of the metric that picked the answering version's checkpoint; of 0.02, 2 points."
    )
    max_slowdown: float = Field(1.5, gt=0, description="Times as long for passes over the same rows.")


class Rollout(Section):
    """The versions of one model that every replica holds, each as name@number, and who answers."""

    production: str = Field(description="What answers.")
    previous: str | None = Field(None, description="Kept loaded, so that a rollback is instant.")
    candidate: str | None = Field(None, description="Answers its share of requests, by a hash of the request's id.")
    traffic: dict[Literal["production", "candidate"], float] = Field(
        {"production": 1.0}, description="The share of requests that each answers; together 1."
    )
    shadow: str | None = Field(
        None, description="Answers some requests for nobody, beside production; where the two differ is counted."
    )
    accepted: tuple[str, ...] = Field(
        (),
        description="Versions that passed the gate elsewhere, or are gone back to: they are not compared again. "
        "banjoray deploy and rollback write it.",
    )
    gate: Gate = Field(default_factory=Gate, description="What a version may be worse by, before it answers anybody.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(share < 0 for share in self.traffic.values()) or abs(sum(self.traffic.values()) - 1) > 1e-6:
            raise ValueError(f"traffic: found {self.traffic}; needed shares that are 1 together")
        if self.share and self.candidate is None:
            raise ValueError("traffic: found a share for the candidate; needed candidate, the version that gets it")
        for role, reference in self.references.items():
            if not _VERSION.fullmatch(reference):
                raise ValueError(f"{role}: found {reference!r:.100}; needed name@number, since an alias moves")
        names = {reference.partition("@")[0] for reference in self.references.values()}
        if len(names) > 1:
            raise ValueError(f"found versions of {' and '.join(sorted(names))}; needed versions of one model")
        return self

    @property
    def share(self) -> float:
        """The share of requests that the candidate answers, 0 to 1."""
        return self.traffic.get("candidate", 0.0)

    @property
    def references(self) -> dict[str, str]:
        """Role -> name@number, of those that there are."""
        found = {role: getattr(self, role) for role in ("production", "previous", "candidate", "shadow")}
        return {role: reference for role, reference in found.items() if reference is not None}

    @property
    def held(self) -> dict[str, Any]:
        """What a replica that follows says that it holds: `references`, and traffic where there is a candidate."""
        traffic = {"production": 1 - self.share, "candidate": self.share}
        return self.references | ({"traffic": traffic} if self.candidate is not None else {})


def rollouts(user_config: object, names: Iterable[str], origin: str) -> dict[str, Rollout]:
    """Model -> its rollout, of those in a deployment's ``user_config``; ``names`` are the models that it serves.

    Raises ConfigError: a model that is not served, versions of another model, a wrong key or value.
    """
    known = sorted(names)
    found: dict[str, Rollout] = {}
    if not isinstance(user_config, Mapping):
        raise ConfigError(f"{origin}: found {user_config!r:.100}; needed a rollout for each model, by its name")
    for name, values in user_config.items():
        if name not in known:
            raise ConfigError(f"{origin}: found rollout of '{name}'; this application serves {', '.join(known)}")
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{origin}.{name}: found {values!r:.100}; needed keys and values, as production: {name}@1"
            )
        found[name] = validate(Rollout, values, f"{origin}.{name}")
        other = [reference for reference in found[name].references.values() if reference.partition("@")[0] != name]
        if other:
            raise ConfigError(f"{origin}.{name}: found {other[0]}; needed a version of {name}")
    return found
