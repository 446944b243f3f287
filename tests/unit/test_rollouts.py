"""Which versions a replica comes to hold: compared before they answer, refused with a reason, dropped when unused."""

import asyncio
import gc
import json
import re
import threading
import weakref
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from banjoray.config.rollout import Gate, Rollout, rollouts
from banjoray.config.section import validate
from banjoray.config.serve import ServeConfig
from banjoray.errors import ConfigError, RequestError
from banjoray.serving.candidates import Verdict
from banjoray.serving.choosing import ASKED
from banjoray.serving.replica import Replica, Slot
from banjoray.serving.rollouts import Rollouts
from banjoray.serving.routes import application
from banjoray.serving.shadow import Shadow
from endpoints import Plain

PATIENCE_S = 60.0


class Numbered(Plain):
    """A version of a model; its second one says the other label."""

    def __init__(self, reference: str) -> None:
        super().__init__()
        model, _, number = reference.partition("@")
        self.version = replace(self.version, model=model, version=int(number))
        self.labels = ("no", "yes")
        self.chosen = ASKED

    def forward(self, features: Any) -> list[np.ndarray]:
        super().forward(features)
        return [np.array([0.0, 1.0] if self.version.version % 2 else [1.0, 0.0]) for _ in features]

    def answer(self, ask: Any, rows: Any, outputs: Any) -> Any:
        return [[{"label": self.labels[int(output.argmax())], "score": 1.0}] for output in outputs]


class World:
    """A replica whose versions are loaded and compared by a table instead of by files; ``log`` is what it told."""

    def __init__(self, **args: Any) -> None:
        self.replica = Replica(validate(ServeConfig, {"model": "tiny@1", "access_log": False} | args, "args"))
        self.log: list[str] = []
        self.replica.telemetry._write = self.log.append
        self.broken: set[str] = set()
        self.worse: set[str] = set()
        self.confused: set[str] = set()
        self.loaded: list[str] = []
        self.compared: list[tuple[str, str, Gate]] = []
        self.hold = threading.Event()
        self.hold.set()
        self.rollouts = Rollouts(self.replica, self._load, self._compare)

    def _load(self, reference: str) -> Any:
        assert self.hold.wait(PATIENCE_S)
        self.loaded.append(reference)
        if reference in self.broken:
            raise OSError("half of the file is missing")
        return Numbered(reference)

    def _compare(self, candidate: Any, live: Any, gate: Gate) -> Verdict:
        pair = (str(candidate.version), str(live.version))
        self.compared.append((*pair, gate))
        if pair[0] in self.confused:
            raise KeyError("a secret text")
        return Verdict(*pair, why="its f1 is 0.1" if pair[0] in self.worse else "")

    async def follow(self, **plan: Any) -> None:
        """Follow a plan and wait for what is done beside the requests."""
        await self.rollouts.follow({"tiny": Rollout(**plan)})
        while self.rollouts._following:
            await asyncio.gather(*self.rollouts._following)

    async def shadowed(self) -> Shadow:
        """The shadow tiny@2 beside tiny@1."""
        for _ in range(2):
            await self.follow(production="tiny@1", shadow="tiny@2")
        assert self.slot.shadow is not None
        return self.slot.shadow

    def client(self) -> httpx.AsyncClient:
        """One of the replica's application."""
        transport = httpx.ASGITransport(application(lambda: self.replica))
        return httpx.AsyncClient(transport=transport, base_url="http://in.process")

    @property
    def slot(self) -> Slot:
        return self.replica.slots["tiny"]


def run(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, PATIENCE_S))


def test_a_replica_that_starts_takes_the_version_as_it_is_and_loads_the_one_before_beside_it() -> None:
    world = World()

    async def scene() -> None:
        await world.rollouts.follow({"tiny": Rollout(production="tiny@2", previous="tiny@1", accepted=("tiny@2",))})
        assert str(world.slot.production.version) == "tiny@2"
        await world.follow(production="tiny@2", previous="tiny@1", accepted=("tiny@2",))
        assert world.slot.held == {"production": "tiny@2", "previous": "tiny@1"}
        assert world.compared == []

    run(scene())


def test_a_replica_that_starts_compares_a_version_that_nobody_has_accepted_with_the_one_before() -> None:
    worlds = World(), World()
    worlds[0].worse.add("tiny@2")

    async def scene() -> None:
        for world in worlds:
            await world.follow(production="tiny@2", previous="tiny@1")
            assert world.compared == [("tiny@2", "tiny@1", Gate())]
        assert worlds[0].slot.held == {"production": "tiny@1"}
        assert worlds[0].slot.refused == "tiny@2 is refused: its f1 is 0.1"
        assert "its f1 is 0.1" in "".join(worlds[0].log)
        assert worlds[1].slot.held == {"production": "tiny@2", "previous": "tiny@1"}

    run(scene())


def test_a_replica_without_any_version_does_not_start() -> None:
    world = World()
    world.broken.add("tiny@1")

    async def scene() -> None:
        with pytest.raises(OSError, match="half of the file"):
            await world.follow(production="tiny@1")

    run(scene())
    assert world.replica.slots == {}


@pytest.mark.parametrize(
    ("broken", "why"),
    [(True, "it can't be loaded (OSError: half of the file is missing)"), (False, "its f1 is 0.1")],
    ids=["broken", "worse"],
)
def test_what_is_refused_changes_nothing_and_is_dropped(broken: bool, why: str) -> None:
    world = World()
    (world.broken if broken else world.worse).add("tiny@2")

    async def scene() -> None:
        await world.follow(production="tiny@1")
        before = world.slot
        (verdict,) = await world.rollouts.prepare({"tiny": Rollout(production="tiny@2", previous="tiny@1")})
        assert (verdict.version, verdict.against, verdict.why) == ("tiny@2", "tiny@1", why)
        assert world.slot is before
        await world.follow(production="tiny@2", previous="tiny@1")
        assert (world.slot.production, world.slot.refused) == (before.production, f"tiny@2 is refused: {why}")
        assert list(world.rollouts._held) == ["tiny@1"]
        await world.follow(production="tiny@1")
        assert world.slot.refused == ""

    run(scene())


def test_what_breaks_on_the_probe_rows_is_refused_and_their_texts_are_not_told() -> None:
    world = World()
    world.confused.add("tiny@2")

    async def scene() -> None:
        await world.follow(production="tiny@1")
        await world.follow(production="tiny@2", previous="tiny@1")
        why = "it can't answer the probe rows (KeyError; the replica's log says where)"
        assert world.slot.refused == f"tiny@2 is refused: {why}"
        bug = json.loads(world.log[0])
        assert (bug["where"], bug["exception"]) == ("probe rows, tiny@2", "KeyError")
        assert "test_rollouts.py" in bug["at"][-1]
        assert "secret" not in "".join(world.log)

    run(scene())


def test_a_shadow_has_the_labels_of_production() -> None:
    world = World()

    async def scene() -> None:
        await world.follow(production="tiny@1")
        world.slot.production.engine.labels = ("yes", "no")
        await world.follow(production="tiny@1", shadow="tiny@2")
        assert world.slot.held == {"production": "tiny@1"}
        assert world.slot.refused.startswith("tiny@2 is refused: its labels are no, yes; needed yes, no")

    run(scene())


def test_what_was_prepared_is_swapped_before_follow_returns_and_what_was_not_is_loaded_beside_requests() -> None:
    world = World()

    async def scene() -> None:
        await world.follow(production="tiny@1")
        plan = {"tiny": Rollout(production="tiny@2", previous="tiny@1")}
        await world.rollouts.prepare(plan)
        await world.rollouts.follow(plan)
        assert world.slot.held == {"production": "tiny@2", "previous": "tiny@1"}
        assert world.loaded == ["tiny@1", "tiny@2"]
        world.hold.clear()
        await world.rollouts.follow({"tiny": Rollout(production="tiny@3", previous="tiny@2")})
        assert world.slot.held == {"production": "tiny@2", "previous": "tiny@1"}
        world.hold.set()
        await asyncio.gather(*world.rollouts._following)
        assert world.slot.held == {"production": "tiny@3", "previous": "tiny@2"}

    run(scene())


def test_a_rollback_takes_the_version_that_is_kept_without_loading_or_comparing() -> None:
    world = World()
    world.worse.add("tiny@1")

    async def scene() -> None:
        await world.follow(production="tiny@1")
        await world.follow(production="tiny@2", previous="tiny@1")
        compared = list(world.compared)
        back = {"tiny": Rollout(production="tiny@1", previous="tiny@2", accepted=("tiny@1",))}
        await world.rollouts.follow(back)
        assert world.slot.held == {"production": "tiny@1", "previous": "tiny@2"}
        assert (world.loaded, world.compared) == (["tiny@1", "tiny@2"], compared)

    run(scene())


def test_a_verdict_counts_for_its_gate_alone() -> None:
    world = World()
    loose = Gate(max_drop=1.0)

    async def scene() -> None:
        await world.follow(production="tiny@1")
        for gate in (Gate(), Gate(), loose):
            await world.rollouts.prepare({"tiny": Rollout(production="tiny@2", gate=gate)})
        assert [each[2] for each in world.compared] == [Gate(), loose]

    run(scene())


def test_a_version_that_nothing_names_any_more_is_freed() -> None:
    world = World()

    async def scene() -> None:
        await world.follow(production="tiny@1")
        first = weakref.ref(world.slot.production.engine)
        await world.follow(production="tiny@2", previous="tiny@1")
        gc.collect()
        assert first() is not None
        await world.follow(production="tiny@3", previous="tiny@2")
        assert first() is None

    run(scene())


def test_requests_go_to_the_candidate_by_their_id_and_by_its_name() -> None:
    world = World()

    async def scene() -> None:
        await world.follow(production="tiny@1")
        await world.follow(production="tiny@1", candidate="tiny@2", traffic={"production": 0.8, "candidate": 0.2})
        named = [str(world.slot.answering(f"id-{number}").version) for number in range(2000)]
        assert named == [str(world.slot.answering(f"id-{number}").version) for number in range(2000)]
        assert 300 < named.count("tiny@2") < 500
        assert str(world.replica.pick("tiny@2").version) == "tiny@2"
        with pytest.raises(RequestError, match="found 'tiny@3'; this endpoint serves 'tiny' "):
            world.replica.pick("tiny@3")

    run(scene())


def test_a_shadow_is_asked_beside_production_and_told_by_label() -> None:
    world = World()

    async def scene() -> None:
        shadow = await world.shadowed()
        async with world.client() as client:
            for _ in range(3):
                answer = await client.post("/", json={"inputs": ["a", "b"]})
                assert (answer.headers["x-model-version"], answer.json()[0][0]["label"]) == ("tiny@1", "yes")
                assert shadow._running is not None
                await shadow._running
            shadow.served.engine.error = ValueError("a secret text")  # type: ignore[attr-defined]
            await client.post("/", json={"inputs": "a"})
            assert shadow._running is not None
            await shadow._running
            told = (await client.get("/")).json()["rollout"]["shadow"]
            metrics = (await client.get("/metrics")).text
        assert told == {
            "version": "tiny@2",
            "rows": 6,
            "differ": 6,
            "by_label": {"yes": {"rows": 6, "differ": 6}},
            "passed_over": 0,
            "failed": 1,
        }
        assert 'banjoray_shadow_rows_total{label="yes",replica="",same="no",version="tiny@2"} 6.0' in metrics
        assert "ValueError" in world.log[-1]
        assert "secret" not in world.log[-1]

    run(scene())


def test_requests_that_come_while_a_shadow_answers_are_passed_over() -> None:
    world = World()

    async def scene() -> None:
        shadow = await world.shadowed()
        shadow._running = asyncio.get_running_loop().create_future()  # type: ignore[assignment]
        async with world.client() as client:
            assert (await client.post("/", json={"inputs": "a"})).status_code == 200
        assert (shadow.passed_over, shadow.rows.total()) == (1, 0)

    run(scene())


def test_several_models_are_picked_by_name_and_a_request_has_to_name_one() -> None:
    world = World()

    async def scene() -> None:
        await world.rollouts.follow({name: Rollout(production=f"{name}@1") for name in ("tiny", "other")})
        async with world.client() as client:
            for name in ("tiny", "other"):
                answer = await client.post(f"/models/{name}", json={"inputs": "a"})
                assert answer.headers["x-model-version"] == f"{name}@1"
            unnamed = await client.post("/", json={"inputs": "a"})
            assert (unnamed.status_code, unnamed.json()["error"]) == (
                422,
                "model: missing; this endpoint serves 'other' ('other@1') and 'tiny' ('tiny@1')",
            )
            assert [each["model"] for each in (await client.get("/")).json()["models"]] == ["other", "tiny"]
            assert [each["id"] for each in (await client.get("/v1/models")).json()["data"]] == ["other", "tiny"]
            assert (await client.get("/models/none")).status_code == 404

    run(scene())


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"other": {}}, "user_config: found rollout of 'other'; this application serves tiny"),
        ({"tiny": 3}, "user_config.tiny: found 3; needed keys"),
        ({"tiny": {}}, "user_config.tiny: key 'production' is missing"),
        ({"tiny": {"production": "other@1"}}, "user_config.tiny: found other@1; needed a version of tiny"),
        ({"tiny": {"production": "tiny@1", "shadow": "b@1"}}, "versions of b and tiny; needed versions of one"),
        ({"tiny": {"production": "tiny@1", "traffic": {"production": 0.5}}}, "needed shares that are 1 together"),
        (
            {"tiny": {"production": "tiny@1", "traffic": {"production": 0.5, "candidate": 0.5}}},
            "found a share for the candidate; needed candidate",
        ),
        ({"tiny": {"production": "tiny@1", "canary": "tiny@2"}}, "unknown key 'canary'"),
        (
            {"tiny": {"production": "tiny@live"}},
            "production: found 'tiny@live'; needed name@number",
        ),
        (["tiny@1"], "user_config: found ['tiny@1']; needed a rollout for each model"),
    ],
)
def test_a_wrong_rollout_says_what_is_wrong(values: Any, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rollouts(values, ["tiny"], "user_config")
    assert why in str(caught.value)


def test_the_rollout_in_the_docs_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs/deploying.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (deployment,) = yaml.safe_load(block)["deployments"]
    (plan,) = rollouts(deployment["user_config"], ["emotion"], "docs").values()
    assert (plan.production, plan.share, plan.gate) == ("emotion@8", 0.1, Gate())


def test_a_rollout_is_written_beside_all_that_is_deployed() -> None:
    from banjoray.cluster.deploy import with_rollout

    config = {"name": "a", "route_prefix": "/", "import_path": "x:y", "args": {"model": "tiny@1"}}
    endpoint = {"name": "Endpoint", "num_replicas": 3, "user_config": {"other": {"production": "other@4"}}}
    whole = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": 8123},
        "grpc_options": None,
        "target_capacity": 50.0,
        "applications": {
            "a": {"deployed_app_config": config | {"deployments": [{"name": "More"}, endpoint]}},
            "b": {"deployed_app_config": config | {"name": "b", "route_prefix": "/b"}},
            "by serve.run": {"deployed_app_config": None},
        },
    }
    plan = Rollout(production="tiny@2", previous="tiny@1")
    found = with_rollout(whole, "a", "tiny", plan).model_dump(exclude_unset=True)
    assert [application["name"] for application in found["applications"]] == ["a", "b"]
    assert (found["target_capacity"], found["http_options"]["port"]) == (50.0, 8123)
    more, mine = found["applications"][0]["deployments"]
    assert (more["name"], mine["num_replicas"]) == ("More", 3)
    assert mine["user_config"] == {"other": {"production": "other@4"}, "tiny": plan.model_dump()}
    assert "deployments" not in found["applications"][1]
    # Where the file says nothing of the deployment, that is all that is said.
    (alone,) = with_rollout(whole, "b", "tiny", plan).model_dump(exclude_unset=True)["applications"][1]["deployments"]
    assert alone == {"name": "Endpoint", "user_config": {"tiny": plan.model_dump()}}
