"""Another version of a model that is served, without a restart: compared in every replica first, then swapped in all.

Two steps. Every replica loads the version beside what answers and compares the two; nothing has changed so far, and one
refusal ends it. Then the deployment's ``user_config`` is written, which Serve gives to every replica, also to those
that start later: there the version is loaded already, so that the swap is a moment.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from ray.serve.schema import ServeDeploySchema

import ray
from banjoray.config.rollout import Rollout
from banjoray.config.section import validate
from banjoray.config.serve import ServeConfig
from banjoray.errors import ClusterError, ConfigError, GateRefused
from banjoray.registry import Registry
from ray import serve

BUILD = "banjoray.serving.app:build"
DEPLOYMENT = "Endpoint"
PAUSE_S = 0.02
Held = dict[str, Any]
"""Role -> name@number, and the traffic of each where there is a candidate, as every replica has it."""


@dataclass(frozen=True)
class Deployed:
    """What a change came to: who answers now and did before, what the replicas found, and how long the swap took."""

    model: str
    rollout: Rollout
    before: Held
    verdicts: tuple[Mapping[str, Any], ...]
    swap_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"rollout": self.rollout.model_dump(), "verdicts": [dict(each) for each in self.verdicts]}


@dataclass(frozen=True)
class Place:
    """The application that serves a model in a running Ray."""

    application: str
    config: ServeConfig

    def call(self, method: str, *args: Any, timeout_s: float = 600.0) -> list[Any]:
        """What a method of every running replica returns; raises ClusterError, also where they are scaled to zero."""
        handle = serve.get_deployment_handle(DEPLOYMENT, self.application)
        until = time.monotonic() + timeout_s
        while True:
            try:
                found: list[Any] = handle.broadcast(method, *args).results(timeout_s=timeout_s)
                return found
            except serve.exceptions.DeploymentUnavailableError:
                # None is running for the moment in which the only one is told its user_config.
                where = f"application {self.application}: no replica is running"
                if not self.wanted():
                    raise ClusterError(f"{where}, it is scaled to zero; send it a request, and try again") from None
                if time.monotonic() > until:
                    raise ClusterError(where) from None
                time.sleep(PAUSE_S)
            except (ray.exceptions.RayError, TimeoutError, serve.exceptions.RayServeException) as error:
                where = f"application {self.application}"
                raise ClusterError(f"{where}: {method} did not end in every replica: {error}") from None

    def wanted(self) -> int:
        """How many replicas Serve wants there to be; raises ClusterError: the application is gone."""
        client: Any = serve.context._get_global_client()  # noqa: SLF001
        application = client.get_serve_details()["applications"].get(self.application)
        if application is None or DEPLOYMENT not in application["deployments"]:
            raise ClusterError(f"application {self.application}: it is not deployed any more")
        count: int = application["deployments"][DEPLOYMENT]["target_num_replicas"]
        return count

    def settled(self) -> int | None:
        """How many replicas there are, all of which run; None while Serve still changes some."""
        deployment = serve.status().applications[self.application].deployments[DEPLOYMENT]
        states = {str(state): count for state, count in deployment.replica_states.items() if count}
        return states["RUNNING"] if list(states) == ["RUNNING"] else None

    def held(self, model: str) -> Held:
        """What the replicas hold of a model; raises ClusterError if they differ."""
        found: list[Held] = [each[model]["held"] for each in self.call("held")]
        if any(each != found[0] for each in found):
            raise ClusterError(
                f"{model}: replicas hold {found}; wait until all hold the same, or deploy a version again"
            )
        return found[0]

    def follow(self, model: str, rollout: Rollout, before: Held, timeout_s: float = 120.0) -> float:
        """Write a model's rollout into the deployment's user_config; seconds until every replica has followed it.

        Raises ClusterError: replicas do not hold what they did ``before``; one has not followed within ``timeout_s``,
        and why.
        """
        began = time.monotonic()
        client: Any = serve.context._get_global_client()  # noqa: SLF001
        # Read now: loading and comparing took time, in which others may have changed what is deployed.
        whole = client.get_serve_details()
        if (now := self.held(model)) != before:
            raise ClusterError(
                f"{model}: another change came first: replicas held {before} and now {now}; this one was not made"
            )
        client.deploy_apps(with_rollout(whole, self.application, model, rollout), _blocking=False)
        while True:
            count, found = self.settled(), [each[model] for each in self.call("held")]
            if len(found) == count and all(each["held"] == rollout.held for each in found):
                return time.monotonic() - began
            if time.monotonic() - began > timeout_s:
                told = [each["refused"] or str(each["held"]) for each in found]
                raise ClusterError(f"{model}: not every replica follows after {timeout_s:g} s: {'; '.join(told)}")
            time.sleep(PAUSE_S)


def deploy(
    reference: str, role: str, change: Mapping[str, Any], where: tuple[str, str | None], say: Callable[[str], None]
) -> Deployed:
    """Give a version a role (production, candidate or shadow) in the application that serves its model.

    ``change`` are more keys of the rollout: traffic, gate. ``where`` is the address of a Ray, and the application's
    name or None. Raises GateRefused: a replica refused it, and why; ConfigError: nothing serves the model;
    ClusterError.
    """
    model = reference.partition("@")[0]
    with _found(model, where) as place:
        version = str(Registry(place.config.registry).resolve(reference))
        before = place.held(model)
        wanted = {**_wanted(before, role, version), **change}
        say(f"loading {version} beside {before['production']} and comparing them")
        verdicts = _prepared(place, model, validate(Rollout, wanted, "rollout"))
        accepted = [wanted[each] for each in ("production", "candidate") if each in wanted]
        rollout = validate(Rollout, wanted | {"accepted": accepted}, "rollout")
        return Deployed(model, rollout, before, tuple(verdicts), place.follow(model, rollout, before))


def rollback(model: str, where: tuple[str, str | None]) -> Deployed:
    """Take the last change back: the candidate away where there is one, else the version before into production.

    Raises ConfigError: nothing serves the model, or there is no version before.
    """
    with _found(model, where) as place:
        before = place.held(model)
        if "candidate" in before:
            wanted = {key: held for key, held in before.items() if key not in ("candidate", "traffic")}
        elif "previous" in before:
            wanted = {"production": before["previous"], "previous": before["production"]}
        else:
            raise ConfigError(f"{model}: {before['production']} is the first version here; deploy the one you need")
        rollout = validate(Rollout, wanted | {"accepted": [wanted["production"]]}, "rollout")
        return Deployed(model, rollout, before, (), place.follow(model, rollout, before))


def _wanted(before: Held, role: str, version: str) -> dict[str, Any]:
    """The roles after a change; with a new version in production, candidate and shadow have had their time."""
    if role != "production":
        return {**before, role: version}
    previous = before.get("previous") if version == before["production"] else before["production"]
    return {"production": version} | ({"previous": previous} if previous else {})


def _prepared(place: Place, model: str, rollout: Rollout) -> list[Mapping[str, Any]]:
    """The verdicts of all replicas, none of which refuses."""
    found = [verdict for of_one in place.call("prepare", {model: rollout.model_dump()}) for verdict in of_one]
    reasons = sorted({f"{verdict['version']} is refused: {verdict['why']}" for verdict in found if verdict["why"]})
    if reasons:
        place.call("forget")
        raise GateRefused("; ".join(reasons))
    return found


@contextmanager
def _found(model: str, where: tuple[str, str | None]) -> Iterator[Place]:
    """Where a model is served; joins a Ray for as long as the block runs, unless this process is in one."""
    address, application = where
    joined = not ray.is_initialized()
    # What Serve's client says of itself is for Serve's log file.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        if joined:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        client: Any = serve.context._get_global_client(raise_if_no_controller_running=False)  # noqa: SLF001
        if client is None:
            raise ConfigError("Ray runs there, and no Ray Serve; start one with banjoray serve")
        yield _place(client.get_serve_details(), model, application)
    except ConnectionError as error:
        raise ConfigError(f"no Ray at address {address} ({error}); start one with banjoray serve") from None
    finally:
        if joined:
            ray.shutdown()


def _place(whole: Mapping[str, Any], model: str, application: str | None) -> Place:
    found = []
    for name, details in whole["applications"].items():
        deployed = details.get("deployed_app_config") or {}
        if deployed.get("import_path") != BUILD or application not in (None, name):
            continue
        config = validate(ServeConfig, deployed["args"], f"application {name}: args")
        if model in (reference.partition("@")[0] for reference in config.references):
            found.append(Place(name, config))
    if not found:
        known = ", ".join(whole["applications"]) or "none"
        raise ConfigError(
            f"no application serves {model}{f' as {application}' if application else ''}; there are: {known}"
        )
    if len(found) > 1:
        raise ConfigError(f"{' and '.join(place.application for place in found)} serve {model}; name one with --app")
    return found[0]


def with_rollout(whole: Mapping[str, Any], application: str, model: str, rollout: Rollout) -> ServeDeploySchema:
    """Everything that Serve tells to be deployed, with a model's rollout in an application's user_config.

    Applications that no config file deployed (serve.run) are not Serve's to be told again, and stay.
    """
    applications = []
    for name, details in whole["applications"].items():
        if details.get("deployed_app_config") is None:
            continue
        told: dict[str, Any] = dict(details["deployed_app_config"])
        if name == application:
            deployments: list[dict[str, Any]] = list(told.get("deployments") or ())
            usual: dict[str, Any] = {"name": DEPLOYMENT}
            mine = next((each for each in deployments if each["name"] == DEPLOYMENT), usual)
            others = [each for each in deployments if each is not mine]
            user_config = {**(mine.get("user_config") or {}), model: rollout.model_dump()}
            told["deployments"] = [*others, mine | {"user_config": user_config}]
        applications.append(told)
    kept = {key: whole[key] for key in ("proxy_location", "http_options", "grpc_options", "target_capacity")}
    given = {key: value for key, value in kept.items() if value is not None}
    return ServeDeploySchema.model_validate(given | {"applications": applications})
