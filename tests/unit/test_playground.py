"""The playground: what is sent, with which headers, to whom; its colours. `tests/serve` looks at it with a browser."""

import base64
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from banjoray.serving.playground import page
from banjoray.serving.security import add_key
from pages import ENGINES, labelled
from replicas import InProcess

FOLDER = Path(page.__file__).parent
ASSETS = sorted(file.name for file in FOLDER.iterdir() if file.suffix in (".css", ".js", ".svg"))
TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    found = InProcess(labelled(tmp_path_factory.mktemp("labels"), "text-classification"))
    yield found
    found.close()


class Links(HTMLParser):
    """What a page loads and links to, and what it holds besides text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("href", "src") and value]


def test_the_page_and_its_files_are_sent_as_what_they_are_under_a_strict_policy(asked: InProcess) -> None:
    assert len(ASSETS) >= 8
    for path in ("/ui", "/ui/about", *(f"/ui/{name}" for name in ASSETS)):
        answer = asked.request("GET", path)
        assert answer.status_code == 200
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert {policy[f"{kind}-src"] for kind in ("script", "style", "connect", "img")} == {"'self'"}
        assert "unsafe" not in str(policy)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert not [name for name in answer.headers if name.startswith("access-control")]
        if path.count("/") == 2 and "." in path:
            name = path.removeprefix("/ui/")
            assert answer.headers["content-type"] == TYPES[Path(name).suffix]
            assert answer.content == (FOLDER / name).read_bytes()
    assert asked.request("GET", "/ui").headers["content-type"] == "text/html; charset=utf-8"


def test_the_page_needs_nothing_from_elsewhere_and_nothing_that_the_policy_forbids() -> None:
    found = Links((FOLDER / "index.html").read_text(encoding="utf-8"))
    assert {link for link in found.links if not link.startswith("ui/")} == {"openapi.json"}
    assert {link.removeprefix("ui/") for link in found.links} - {"openapi.json"} <= set(ASSETS)
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert tag != "style"
        assert tag != "script" or attributes.get("src")
    for name in ASSETS:
        text = (FOLDER / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), name
        assert text.isascii()
        assert len(text.splitlines()) <= 400
    imported = {name for file in FOLDER.glob("*.js") for name in re.findall(r'from "\./(\w+\.js)"', file.read_text())}
    assert {file.name for file in FOLDER.glob("*.js")} == imported | {"app.js"}


@pytest.mark.parametrize("path", ["/ui/page.py", "/ui/__init__.py", "/ui/index.js", "/ui/..%2fpage.py", "/ui/a/b"])
def test_no_other_file_is_sent(asked: InProcess, path: str) -> None:
    answer = asked.request("GET", path)
    assert (answer.status_code, set(answer.json())) == (404, {"error"})


def test_the_page_is_the_same_under_a_prefix(asked: InProcess) -> None:
    plain = asked.request("GET", "/ui").content
    asked.root = "/tiny"
    try:
        assert asked.request("GET", "/tiny/ui").content == plain
        assert asked.request("GET", "/tiny/ui/app.js").status_code == 200
        assert asked.request("GET", "/tiny/ui/about").json()["task"] == "text-classification"
    finally:
        asked.root = ""
    # Links are relative to /tiny/ui, so they lead to /tiny/...; none may begin anew.
    assert not [link for link in Links(plain.decode()).links if link.startswith("/")]


ABOUT = {
    "labels": ("text-classification", "single_label_classification", ["text"], None),
    "several": ("text-classification", "multi_label_classification", ["text"], None),
    "number": ("text-classification", "regression", ["text"], None),
    "pair": ("text-classification", "single_label_classification", ["text", "text_pair"], None),
    "masks": ("fill-mask", None, ["text"], "[MASK]"),
    "answers": ("question-answering", None, ["question", "context"], None),
}


@pytest.mark.parametrize("name", ABOUT)
def test_the_page_is_told_what_its_form_needs(name: str, tmp_path: Path) -> None:
    found = InProcess(ENGINES[name](tmp_path))
    task, problem, cells, mask = ABOUT[name]
    told = {"task": task, "problem_type": problem, "cells": cells, "mask": mask, "keys": False}
    assert found.request("GET", "/ui/about").json() == told
    found.close()


def test_it_can_be_turned_off(asked: InProcess) -> None:
    closed = InProcess(asked.engine, playground=False)
    for path in ("/ui", "/ui/about", "/ui/app.js"):
        answer = closed.request("GET", path)
        told = {"error": f"GET {path}: the playground is off (playground: false)"}
        assert (answer.status_code, answer.json()) == (404, told)
    assert closed.request("GET", "/").status_code == 200
    closed.close()


def test_with_keys_a_browser_is_made_to_ask_for_one_and_may_send_it_as_a_password(
    asked: InProcess, tmp_path: Path
) -> None:
    key = add_key(tmp_path / "keys.yaml", "alice")
    closed = InProcess(asked.engine, api_keys=str(tmp_path / "keys.yaml"))
    closed.root = "/tiny"
    for path in ("/ui", "/ui/about", "/ui/app.js"):
        for headers in ({}, {"authorization": "Bearer wrong"}, basic("alice", "wrong")):
            answer = closed.request("GET", f"/tiny{path}", headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == 'Basic realm="banjoray", charset="UTF-8"'
    closed.root = ""
    assert closed.request("GET", "/uix").headers["www-authenticate"].startswith("Bearer")
    for headers in (basic("", key), basic("anybody", key), {"authorization": f"Bearer {key}"}):
        assert closed.request("GET", "/ui", headers=headers).status_code == 200
        assert closed.request("GET", "/ui/about", headers=headers).json()["keys"] is True
        assert closed.request("POST", "/", headers=headers, json={"inputs": "a"}).status_code == 200
    closed.close()


def basic(user: str, password: str) -> dict[str, str]:
    return {"authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


def test_a_page_of_another_site_gets_nothing_from_a_browser_that_knows_the_key(
    asked: InProcess, tmp_path: Path
) -> None:
    key = add_key(tmp_path / "keys.yaml", "alice")
    closed = InProcess(asked.engine, api_keys=str(tmp_path / "keys.yaml"))

    def status(headers: dict[str, str], method: str = "POST") -> int:
        return closed.request(method, "/", headers=headers, json={"inputs": "a"}).status_code

    foreign: list[dict[str, str]] = [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "origin": "http://in.process"},
        {"origin": "https://example.org"},
        {"origin": "http://in.process:8000"},
        {"origin": "null"},
    ]
    own: list[dict[str, str]] = [
        {},
        {"sec-fetch-site": "same-origin", "origin": "https://a.gateway"},
        {"sec-fetch-site": "none"},
        {"origin": "http://in.process"},
    ]
    assert {status(basic("a", key) | more) for more in foreign} == {403}
    assert {status(basic("a", key) | more) for more in own} == {200}
    # A link may lead here, and no browser adds these by itself.
    assert status(basic("a", key) | foreign[0], "GET") == 200
    assert {status({"authorization": f"Bearer {key}"} | more) for more in foreign} == {200}
    assert {status({"x-api-key": key} | basic("gateway", "its own") | more) for more in foreign} == {200}
    assert status(basic("a", "wrong") | foreign[0]) == 401
    closed.close()


def test_the_tokens_that_were_read_are_told_in_every_protocol(asked: InProcess) -> None:
    for path, body in (("/", {"inputs": ["a b", "c"]}), ("/predict", {"inputs": [["a b"], ["c"]]})):
        assert asked.request("POST", path, json=body).headers["x-tokens"] == "7"
    assert "x-tokens" not in asked.request("GET", "/").headers
    assert "x-tokens" not in asked.request("POST", "/", json={"inputs": ""}).headers


def colours(scheme: str) -> dict[str, str]:
    """The colours of a scheme by name, those that it does not name being the other's."""
    light, dark = re.findall(r":root \{(.*?)\}", (FOLDER / "style.css").read_text(encoding="utf-8"), re.S)[:2]
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light))
    return found if scheme == "light" else found | dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", dark))


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast of two colours, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them_and_controls_from_what_is_around_them(scheme: str) -> None:
    found = colours(scheme)
    words = [(ink, paper) for ink in ("ink", "soft", "accent") for paper in ("card", "paper", "sunk")]
    words += [("on-accent", "accent"), ("bad", "bad-paper"), *((f"k{kind}-ink", f"k{kind}") for kind in range(6))]
    assert {pair for pair in words if contrast(found[pair[0]], found[pair[1]]) < 4.5} == set()
    drawn = [("edge", "card"), ("accent", "card"), ("accent", "paper"), ("accent", "sunk")]
    assert {pair for pair in drawn if contrast(found[pair[0]], found[pair[1]]) < 3} == set()
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
