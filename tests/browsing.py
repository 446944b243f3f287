"""A page in a browser, as somebody without a mouse uses it: what is typed, what is read off it, what its code does."""

import contextlib
import io
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import playwright
import pytest
from playwright.sync_api import Page, expect

from pages import ask
from replicas import InProcess

NODE = Path(playwright.__file__).parent / "driver/node"
# How many controls have neither a label nor words of their own.
UNNAMED = """[...document.querySelectorAll("textarea, input, button")].filter(one => !one.closest("[hidden]")
    && !one.labels?.length && !one.getAttribute("aria-label") && !one.textContent.trim()).length"""


class Site:
    """Playgrounds, and who answers them."""

    def __init__(self, address: str, made: dict[str, InProcess], key: str) -> None:
        self.address, self.made, self.key = address, made, key

    def ask(self, name: str, inputs: Any, **parameters: Any) -> Any:
        return ask(f"{self.address}/{name}", {"inputs": inputs, "parameters": parameters})


def type_(page: Page, label: str, text: str) -> None:
    page.get_by_label(label, exact=True).focus()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(text)


def send(page: Page) -> None:
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_have_text("Done")


def bars(page: Page) -> list[tuple[str, str]]:
    rows = page.locator(".answer .bars li")
    return list(zip(rows.locator(".name").all_text_contents(), rows.locator(".score").all_text_contents(), strict=True))


def percent(score: float) -> str:
    shown = score * 100
    return f"{round(shown)} %" if shown >= 99.95 or shown < 0.05 else f"{shown:.1f} %"


def near(told: list[tuple[str, str]], entries: list[dict[str, Any]], name: str = "label") -> bool:
    """Whether bars are those of an answer; another batch may round otherwise."""
    shown = [(label, float(score.removesuffix(" %"))) for label, score in told]
    wanted: list[Any] = [(entry[name], pytest.approx(entry["score"] * 100, abs=0.11)) for entry in entries]
    return shown == wanted


def marks(page: Page) -> list[tuple[str, str]]:
    """What stands before every mark, and what is marked, read off the page node by node."""
    found = page.locator(".answer .text").evaluate(
        """text => [...text.childNodes].map(node => node.nodeName === "MARK"
            ? ["mark", (node.querySelector(".words") || node).textContent] : ["text", node.textContent])"""
    )
    return [(kind, text) for kind, text in found if text]


def pieces(text: str, spans: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What `marks` should find."""
    found, at = [], 0
    for span in spans:
        found += [("text", text[at : span["start"]]), ("mark", text[span["start"] : span["end"]])]
        at = span["end"]
    return [(kind, part) for kind, part in [*found, ("text", text[at:])] if part]


class Held:
    """A model that writes until a token, and goes on when it may."""

    def __init__(self, patch: pytest.MonkeyPatch, engine: Any, until: int) -> None:
        self.told = 0
        self.ended = threading.Event()
        self.may = threading.Event()
        self.error: Exception | None = None
        streamed = engine.streamed

        def held(ask: Any, rows: Any) -> Callable[[Callable[[Any], None]], None]:
            write = streamed(ask, rows)

            def inner(tell: Callable[[Any], None]) -> None:
                def telling(piece: Any) -> None:
                    if self.told == until:
                        assert self.may.wait(60)
                        if self.error:
                            raise self.error
                    tell(piece)
                    self.told += 1

                try:
                    write(telling)
                finally:
                    self.ended.set()

            return inner

        patch.setattr(engine, "streamed", held)


def tabbed(page: Page) -> set[str]:
    """Where Tab goes from the top, up to the button that copies; wherever it is shows."""
    page.evaluate("document.activeElement.blur()")
    seen: set[str] = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        where, shown = page.evaluate(
            """() => { const at = document.activeElement, seen = at.type === "radio" ? at.nextElementSibling : at;
                return [at.id || at.className || at.href, getComputedStyle(seen).outlineStyle]; }"""
        )
        assert shown == "solid", where
        seen.add(where)
        if where == "copy":
            break
    return seen


def code(page: Page, language: str) -> str:
    page.get_by_label(language).focus()
    page.keyboard.press("Space")
    return page.locator("#snippet").text_content() or ""


def printed(source: str) -> str:
    """What a Python program prints."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(source, "snippet", "exec"), {})
    return shown.getvalue()


def first_text(answer: Any) -> str:
    """A word of an answer that any print of it has."""
    while not isinstance(answer, dict):
        answer = answer[0]
    keys = ("label", "answer", "token_str", "generated_text", "word", "summary_text")
    return next(str(answer[key]) for key in keys if key in answer)


def ran(page: Page, language: str, folder: Path, key: str = "") -> str:
    """What curl or JavaScript prints, as the page shows it."""
    command = {"curl": ["bash", "request.sh"], "JavaScript": [str(NODE), "request.mjs"]}[language]
    source = code(page, language).replace("response.json()", "response.text()")
    assert not key or ("Authorization: Bearer $KEY" in source or "process.env.KEY" in source)
    assert not key or key not in source
    (folder / command[1]).write_text(source, encoding="utf-8")
    environment = os.environ | {"KEY": key}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
