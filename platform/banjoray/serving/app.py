"""HTTP answers from a registered version: one Ray Serve deployment, ingress and model in the same replica."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from banjoray.config.job import is_url, read_yaml
from banjoray.config.rollout import Rollout, rollouts
from banjoray.config.section import validate
from banjoray.config.serve import ServeConfig
from banjoray.errors import ClusterError, ConfigError
from banjoray.garbage import collect_later
from banjoray.registry import Registry

with collect_later():
    from ray.serve.schema import ServeDeploySchema

    import ray
    from banjoray.serving import ingress, routes
    from banjoray.serving.candidates import compared, probe_rows
    from banjoray.serving.choosing import check_kind
    from banjoray.serving.engine import load
    from banjoray.serving.replica import Replica
    from banjoray.serving.rollouts import Rollouts
    from banjoray.serving.security import settled_keys
    from banjoray.training.local_ray import environment
    from banjoray.training.signals import kept_sigterm
    from ray import serve

SWITCH_S = 5e-4


def _replica() -> Replica:
    """Who answers in this process."""
    replica: Replica = serve.get_replica_context().servable_object.replica  # type: ignore[attr-defined]
    return replica


# serve.ingress pickles the routes with the names they use, so what they use stands above them.
api = routes.application(_replica)


# A replica refuses by time, in the shape of a request's protocol, with the seconds to wait. Beyond so many requests at
# once (Serve's default is 5) Serve refuses by itself, by 429 where its default is 503: before it has made anything of
# a request, which costs less than our refusal behind it (benchmarks/LOG.md, too many requests). A replica that died is
# found at the next check: every 2 s, where Serve's default is 10.
@serve.deployment(
    name="Endpoint",
    max_ongoing_requests=64,
    max_queued_requests=64,
    backpressure_config={"status_code": 429, "retry_after_s": 1},
    health_check_period_s=2,
    # A replica writes a line per request itself (telemetry.py).
    logging_config={"enable_access_log": False},
)
@serve.ingress(api)
class Endpoint:
    """One replica. Its models are loaded by `reconfigure`, which Serve calls before the first request."""

    def __init__(self, config: ServeConfig, versions: Mapping[str, str]) -> None:
        # The thread that computes and the loop that answers and refuses hand one lock to and fro. A loop that has much
        # to refuse would keep it for 5 ms each time, several times in a pass.
        sys.setswitchinterval(SWITCH_S)
        self.replica = Replica(config, serve.get_replica_context().replica_id.unique_id)
        self._versions = versions
        self._rollouts = Rollouts(
            self.replica,
            lambda version: load(version, config.registry, config.engine, config.precision),
            lambda candidate, live, gate: compared(candidate, live, probe_rows(live, candidate, config.registry), gate),
        )

    async def reconfigure(self, user_config: object) -> None:
        """Follow a deployment's ``user_config``; returns at once where requests are answered.

        One that is wrong is refused where there is something that answers: Serve would end a replica that raises.
        """
        try:
            await self._rollouts.follow(self._plans(user_config))
        except ConfigError as error:
            if not self.replica.slots:
                raise
            self.replica.telemetry.told("user_config", str(error))

    async def prepare(self, user_config: object) -> list[dict[str, Any]]:
        """`Rollouts.prepare`, as plain values."""
        return [verdict.to_json() for verdict in await self._rollouts.prepare(self._plans(user_config))]

    async def forget(self) -> None:
        """`Rollouts.forget`."""
        await self._rollouts.forget()

    async def held(self) -> dict[str, dict[str, Any]]:
        """Of every model what is held for it, and what was refused since the last change and why."""
        return {name: {"held": slot.held, "refused": slot.refused} for name, slot in self.replica.slots.items()}

    def _plans(self, user_config: object) -> dict[str, Rollout]:
        plain = {name: Rollout(production=version) for name, version in self._versions.items()}
        return plain | rollouts(user_config, self._versions, "user_config")


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application of a serve config's ``args``; Serve calls it.

    An alias is resolved here, once, so that replicas that start later serve the same version.
    Which host the cluster listens on is not known here, so ``api_keys`` has to be said.
    Raises ConfigError, RegistryError.
    """
    config = validate(ServeConfig, args, "args")
    settled_keys(config.api_keys, "this cluster", "args")
    registry = Registry(config.registry)
    found = [registry.resolve(reference) for reference in config.references]
    # Without a user_config, Serve would not call reconfigure.
    deployment = Endpoint.options(user_config={})  # type: ignore[attr-defined]
    application: serve.Application = deployment.bind(config, {version.model: str(version) for version in found})
    return application


@contextmanager
def serving(file: str | Path, port: int | None, say: Callable[[str], None]) -> Iterator[str]:
    """A serve config's applications on this machine while the block runs; the address they answer at.

    Listens on 127.0.0.1 unless the file names a host. Starts a Ray of its own, with HAProxy before the replicas where
    its program is there, and stops all of it at the end. Raises ConfigError: a wrong file, a port in use; ClusterError:
    an application that does not come up, a port that is not given back.
    """
    config = read_config(file, port)
    host, number = config.http_options.host, config.http_options.port
    _check_port(host, number)
    say(f"starting {', '.join(application.name for application in config.applications)}")
    # "Started Serve in namespace ..." is for Serve's log file.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    started = not ray.is_initialized()
    if started:
        slow = ingress.haproxy()
        if slow:
            say(f"without HAProxy ({slow}), Serve's own proxy answers a fraction of the requests per second")
        with kept_sigterm(), environment(ingress.PRIORITY | ({} if slow else ingress.fast_path())):
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        # What `serve run FILE` does: the config goes to Serve's controller as it is.
        serve.start(proxy_location=config.proxy_location, http_options=config.http_options.model_dump())
        client: Any = serve.context._get_global_client()  # noqa: SLF001
        client.deploy_apps(config, _blocking=False)
        _wait_until_running([application.name for application in config.applications])
        yield f"http://{host}:{number}"
    finally:
        # Before Ray: HAProxy is a process that Ray does not know of, and Serve alone ends it.
        serve.shutdown()
        if started:
            ray.shutdown()
    _wait_until_free(host, number)


def read_config(file: str | Path, port: int | None) -> ServeDeploySchema:
    """A serve config, checked down to the arguments of `build`, with what `banjoray serve` sets itself."""
    tree = read_yaml(file)
    if not isinstance(tree.get("applications"), list) or not all(isinstance(a, dict) for a in tree["applications"]):
        raise ConfigError(f"{file}: no list of 'applications'; needed a Ray Serve config (a job file goes to train)")
    if not isinstance(tree.get("http_options") or {}, dict):
        raise ConfigError(f"{file}: http_options: found {tree['http_options']!r}, needed keys and values")
    http = {"host": "127.0.0.1"} | (tree.get("http_options") or {}) | ({"port": port} if port else {})
    for application in tree["applications"]:
        if application.get("import_path") != "banjoray.serving.app:build":
            continue
        args = validate(ServeConfig, application.get("args") or {}, f"{file}: args")
        registry = args.registry if is_url(args.registry) else str(Path(args.registry).expanduser().absolute())
        for reference in args.references:
            check_kind(args.engine, args.precision, Registry(registry).resolve(reference).task)
        _check_rollouts(application.get("deployments"), args, Registry(registry), f"{file}: user_config")
        keys = settled_keys(args.api_keys, str(http["host"]), f"{file}: args")
        application["args"] = args.model_dump() | {"registry": registry, "api_keys": keys}
    try:
        return ServeDeploySchema.model_validate(tree | {"http_options": http})
    except ValidationError as error:
        found = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise ConfigError(f"{file}: not a Ray Serve config: {'; '.join(found)}") from None


def _check_rollouts(deployments: object, args: ServeConfig, registry: Registry, where: str) -> None:
    """Refuse a user_config that can't be followed; what is no list of deployments is for Serve's schema to refuse."""
    names = [reference.partition("@")[0] for reference in args.references]
    for deployment in deployments if isinstance(deployments, list) else ():
        asked = deployment.get("user_config") if isinstance(deployment, dict) else None
        for plan in rollouts({} if asked is None else asked, names, where).values():
            for reference in plan.references.values():
                registry.resolve(reference)


def _check_port(host: str, port: int) -> None:
    if why := ingress.taken(host, port):
        raise ConfigError(f"{host}:{port} can't be used ({why}); stop what listens there, or give --port")


def _wait_until_free(host: str, port: int, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while why := ingress.taken(host, port):
        if time.monotonic() > deadline:
            raise ClusterError(f"{host}:{port} is still in use ({why}) {timeout_s:g} s after Serve was shut down")
        time.sleep(0.1)


def _wait_until_running(names: list[str], timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = {name: serve.status().applications.get(name) for name in names}
        states = {name: status.status if status else "NOT_STARTED" for name, status in found.items()}
        if all(state == "RUNNING" for state in states.values()):
            return
        for name, status in found.items():
            if status is not None and states[name] in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise ClusterError(f"application {name} did not start: {_reason(status)}")
        time.sleep(0.2)
    raise ClusterError(f"applications are not running after {timeout_s:g} s: {states}")


def _reason(status: Any) -> str:
    """The line of Serve's message that says most."""
    messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line]
    return str((telling or lines or ["Serve gives no reason"])[-1])
