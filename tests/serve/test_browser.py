"""The playground in headless Chromium: what is typed is asked, and what is answered is read, without a mouse."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from banjoray.serving.security import add_key
from browsing import (
    UNNAMED,
    Held,
    Site,
    bars,
    code,
    first_text,
    marks,
    near,
    percent,
    pieces,
    printed,
    ran,
    send,
    tabbed,
    type_,
)
from pages import EMOTIONS, ENGINES, ask, chromium, playgrounds, wait_until

# Letters of one, two and more code units, a joined pair, a flag, and what would be HTML.
ODD = (
    "i feel \U0001f600 so happy today \U0001f469\u200d\U0001f680 <b>my love</b> isn't here "
    "and i was \U0001f1f3\U0001f1f4 sad & angry"
)

Open = Callable[..., Page]
Hold = Callable[[int], Held]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = chromium()
    if found is None:
        pytest.skip("no Chromium on this machine, so nobody looked at the playground: apt-get install chromium")
    # A busy machine needs longer than usual, and nothing here waits longer than it has to.
    expect.set_options(timeout=20_000)
    # Chromium's own sandbox refuses to start as root.
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=root)
        yield started
        started.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("pages")
    key = add_key(folder / "keys.yaml", "alice")
    with playgrounds(folder, api_keys=str(folder / "keys.yaml")) as (address, made):
        yield Site(address, made, key)


@pytest.fixture
def opened(browser: Browser, site: Site) -> Iterator[Open]:
    """Opens the playground of an application; at the end, nothing went wrong in any that was opened."""
    wrong: list[str] = []
    contexts = []

    def open_(name: str, **how: Any) -> Page:
        context = browser.new_context(**how)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda told: wrong.append(told.text))
        page.on("request", lambda asked: wrong.extend([] if asked.url.startswith(site.address) else [asked.url]))
        page.goto(f"{site.address}/{name}/ui")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        return page

    yield open_
    for context in contexts:
        context.close()
    # A refused request is told there by the browser itself.
    assert [line for line in wrong if "Failed to load resource" not in line] == []


def test_labels_are_bars_and_version_tokens_and_times_are_told(opened: Open, site: Site) -> None:
    page = opened("labels")
    assert page.get_by_role("heading", level=1).inner_text() == "tiny@1"
    facts = page.locator("#facts").inner_text().split()
    assert facts == ["Task", "text-classification", "Engine", "torch,", "fp32", "Labels", "6"]
    type_(page, "Text", "i did not see that coming")
    send(page)
    (entries,) = site.ask("labels", "i did not see that coming")
    assert {entry["label"] for entry in entries} == set(EMOTIONS)
    assert near(bars(page), entries)
    assert page.locator(".headline strong").inner_text() == entries[0]["label"]
    widths = page.locator(".fill").evaluate_all("all => all.map(one => parseFloat(one.style.inlineSize))")
    assert widths == pytest.approx([entry["score"] * 100 for entry in entries], abs=0.11)
    told = " ".join(page.locator("#told").inner_text().split())
    parts = r"Total [\d.]+ ms encode [\d.]+ ms queue [\d.]+ ms forward [\d.]+ ms other [\d.]+ ms"
    assert re.fullmatch(f"Version tiny@1 Tokens 8 read {parts}", told)
    # The answer is read aloud when it is whole.
    assert page.locator("#answer[aria-live=polite][aria-busy=false]").count() == 1


def test_several_labels_a_number_and_a_pair(opened: Open, site: Site) -> None:
    page = opened("several")
    send(page)
    (entries,) = site.ask("several", "what a lovely surprise")
    chosen = [entry["label"] for entry in entries if entry["predicted"]]
    assert page.locator(".headline strong").inner_text() == (", ".join(chosen) or "No label")
    assert page.locator(".bars .strong .name").all_text_contents() == chosen
    page = opened("number")
    send(page)
    ((number,),) = site.ask("number", "what a lovely surprise")
    assert float(page.locator(".headline strong").inner_text()) == pytest.approx(number["score"], rel=1e-3)
    page = opened("pair")
    type_(page, "Text", "a man")
    type_(page, "Second text", "a woman")
    send(page)
    (entries,) = site.ask("pair", {"text": "a man", "text_pair": "a woman"})
    assert near(bars(page), entries)


def test_any_labels_can_be_asked_for(opened: Open, site: Site) -> None:
    page = opened("any")
    type_(page, "Labels, with commas between them", "love, the weather , , joy")
    page.get_by_label("Several labels may apply").focus()
    page.keyboard.press("Space")
    send(page)
    text = page.get_by_label("Text", exact=True).input_value()
    entries = site.ask("any", text, candidate_labels=["love", "the weather", "joy"], multi_label=True)
    assert near(bars(page), entries)


def test_entities_are_marked_where_they_are_whatever_stands_before_them(opened: Open, site: Site) -> None:
    page = opened("entities")
    type_(page, "Text", ODD)
    send(page)
    found = site.ask("entities", ODD, aggregation_strategy="simple")
    assert len({entity["entity_group"] for entity in found}) == 2
    assert any(ord(letter) > 0xFFFF for letter in ODD[: found[-1]["start"]])
    assert marks(page) == pieces(ODD, found)
    kinds = [f"{entity['entity_group']} {percent(entity['score'])}" for entity in found]
    assert page.locator(".answer .kind").all_text_contents() == kinds
    assert page.locator(".answer b").count() == 0


def test_an_answer_is_marked_in_its_context(opened: Open, site: Site) -> None:
    page = opened("answers")
    type_(page, "Question", "who?")
    type_(page, "Context", f"{ODD}\n\n{ODD}")
    send(page)
    found = site.ask("answers", {"question": "who?", "context": f"{ODD}\n\n{ODD}"})
    assert found["start"] > ODD.index("\U0001f600")
    assert marks(page) == pieces(f"{ODD}\n\n{ODD}", [found])
    assert page.locator(".headline strong").text_content() == found["answer"]


def test_a_mask_is_put_where_the_caret_is_and_filled(opened: Open, site: Site) -> None:
    page = opened("masks")
    type_(page, "Text", "i feel  today")
    for _ in " today":
        page.keyboard.press("ArrowLeft")
    page.get_by_role("button", name="Insert [MASK]").press("Enter")
    assert page.get_by_label("Text").input_value() == "i feel [MASK] today"
    send(page)
    entries = site.ask("masks", "i feel [MASK] today")
    assert near(bars(page), entries, "token_str")
    type_(page, "Text", "[MASK] and [MASK]")
    send(page)
    assert page.locator(".answer h3").all_text_contents() == ["Mask 1", "Mask 2"]
    first, second = site.ask("masks", "[MASK] and [MASK]")
    assert near(bars(page), [*first, *second], "token_str")


def test_texts_are_compared_and_more_can_be_added_and_removed(opened: Open, site: Site) -> None:
    page = opened("vectors")
    page.get_by_role("button", name="Remove text 1").press("Enter")
    page.get_by_role("button", name="Add a text").press("Enter")
    page.keyboard.insert_text("the weather")
    type_(page, "Text 1", "i am so happy")
    send(page)
    texts = [page.get_by_label(f"Text {number}", exact=True).input_value() for number in (1, 2, 3)]
    assert (texts[0], texts[2]) == ("i am so happy", "the weather")
    vectors = site.ask("vectors", texts)
    shown = [
        [float(cell) for cell in row.split()]
        for row in page.locator(".cosines tbody tr").evaluate_all(
            "rows => rows.map(row => [...row.querySelectorAll('td')].map(cell => cell.textContent).join(' '))"
        )
    ]
    cosines = [[sum(a * b for a, b in zip(one, other, strict=True)) for other in vectors] for one in vectors]
    assert shown == [pytest.approx(row, abs=0.0051) for row in cosines]


@pytest.fixture
def hold(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hold]:
    """Lets the writer's model stop after some tokens; at the end, it goes on."""
    made: list[Held] = []

    def hold_(until: int) -> Held:
        made.append(Held(monkeypatch, site.made["writer"].engine, until))
        return made[-1]

    yield hold_
    for held in made:
        held.may.set()


def begins(site: Site, prompt: str, tokens: int) -> str:
    """The text of the first ``tokens`` that the writer writes, which the last of them made longer."""
    (whole,) = site.ask("writer", prompt, max_new_tokens=tokens, details=True)
    texts = ["" if token["special"] else token["text"] for token in whole["details"]["tokens"]]
    assert len(texts) == tokens
    assert texts[-1]
    return "".join(texts)


def test_a_text_is_shown_while_it_is_written(opened: Open, site: Site, hold: Hold) -> None:
    held = hold(5)
    page = opened("writer")
    type_(page, "Prompt", "one two")
    type_(page, "Most new tokens", "8")
    (whole,) = site.ask("writer", "one two", max_new_tokens=8, details=True)
    first = begins(site, "one two", 5)
    assert first != whole["generated_text"]
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_have_text("Writing")
    begun = page.locator(".written")
    expect(begun).to_have_text(first)
    assert page.locator("#answer[aria-busy=true]").count() == 1
    held.may.set()
    expect(page.get_by_role("status")).to_have_text("Done")
    assert begun.text_content() == whole["generated_text"]
    assert "2 read, 8 written" in page.locator("#told").inner_text()
    page.get_by_label("Show every token as it is written").focus()
    page.keyboard.press("Space")
    send(page)
    assert page.locator(".written").text_content() == whole["generated_text"]


@pytest.mark.parametrize("by", ["Escape", "Stop"])
def test_stopping_ends_the_writing_at_the_server(opened: Open, site: Site, hold: Hold, by: str) -> None:
    held = hold(2)
    page = opened("writer")
    type_(page, "Prompt", "one two")
    type_(page, "Most new tokens", "30")
    first = begins(site, "one two", 2)
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_have_text("Writing")
    expect(page.locator(".written")).to_have_text(first)
    if by == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").press("Enter")
    expect(page.get_by_role("status")).to_have_text("Stopped after 2 tokens")
    # The server has noticed: nothing of this request is left in its queue.
    wait_until(lambda: not site.made["writer"].replica._queue._rows)
    held.may.set()
    assert held.ended.wait(60)
    assert held.told == 2
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    assert page.get_by_role("button", name="Send").is_enabled()


def test_a_stream_that_breaks_off_leaves_what_was_written_and_says_so(opened: Open, hold: Hold) -> None:
    held = hold(4)
    page = opened("writer")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_have_text("Writing")
    written = page.locator(".written").text_content()
    held.error = RuntimeError("full")
    held.may.set()
    expect(page.get_by_role("status")).to_have_text("Broken off")
    expect(page.get_by_role("alert")).to_have_text("No answerthe answer broke off; the server's log says why")
    assert (page.locator(".written").text_content() or "").startswith(written or "nothing")


def test_a_summary_is_a_text(opened: Open, site: Site) -> None:
    page = opened("shortener")
    type_(page, "Text", "one two three")
    send(page)
    assert page.locator(".written").text_content() == site.ask("shortener", "one two three")[0]["summary_text"]


def test_of_several_models_each_has_a_page(opened: Open, site: Site) -> None:
    page = opened("both")
    links = page.get_by_role("navigation", name="Models").get_by_role("link")
    assert links.all_text_contents() == ["tiny", "writer"]
    assert links.first.get_attribute("aria-current") == "page"
    type_(page, "Text", "i feel so happy today")
    send(page)
    (entries,) = site.ask("labels", "i feel so happy today")
    assert near(bars(page), entries)
    links.last.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("writer@1")
    page.get_by_label("Prompt", exact=True).wait_for()
    send(page)
    assert page.locator(".written").text_content()


def test_what_is_refused_is_told_in_the_servers_words(opened: Open) -> None:
    page = opened("labels")
    type_(page, "Text", " ")
    page.keyboard.press("Control+Enter")
    told = page.get_by_role("alert")
    expect(told).to_have_text("422inputs.text: found nothing but blanks; needed text")
    type_(page, "Text", "a")
    page.get_by_text("Parameters", exact=True).press("Enter")
    type_(page, "As JSON, for those that have no field here", '{"topk": 1}')
    page.keyboard.press("Control+Enter")
    expect(told).to_have_text(re.compile(r"^422parameters: unknown \['topk'\]"))
    type_(page, "As JSON, for those that have no field here", '{"top_k": ')
    page.keyboard.press("Control+Enter")
    expect(told).to_have_text(re.compile("^Parametersnot JSON"))
    assert page.locator("textarea.code:focus").count() == 1
    type_(page, "As JSON, for those that have no field here", '{"top_k": 2}')
    send(page)
    expect(told).to_have_text("")
    assert len(bars(page)) == 2


@pytest.mark.parametrize("name", ENGINES)
def test_a_phone_and_a_keyboard_are_enough_and_python_as_it_is_shown_gets_the_same_answer(
    opened: Open, site: Site, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    # Other tests' jobs are offline and say so for the whole process; this client talks to this machine.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    page = opened(name, viewport={"width": 360, "height": 640}, color_scheme="dark")
    with page.expect_request("**/models/tiny") as caught:
        send(page)
    expect(page.get_by_role("heading", name="Answer")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate(UNNAMED) == 0
    assert {"send", "copy", "field-1"} <= tabbed(page)
    request = json.loads(caught.value.post_data or "")
    answer = ask(f"{site.address}/{name}", request | {"stream": False} if "stream" in request else request)
    source = code(page, "Python")
    assert "InferenceClient" in source
    assert (str(answer[0][0])[:4] if name == "vectors" else first_text(answer)) in printed(source)


def test_curl_and_javascript_as_they_are_shown_get_the_same_answer(opened: Open, site: Site, tmp_path: Path) -> None:
    page = opened("closed", http_credentials={"username": "anybody", "password": site.key})
    text = 'it\'s "mine" \\ \u00e9 \U0001f600 $KEY `x`'
    type_(page, "Text", text)
    send(page)
    (entries,) = site.ask("labels", text)
    assert near(bars(page), entries)
    for language in ("curl", "JavaScript"):
        found = json.loads(ran(page, language, tmp_path, site.key))
        assert found == [[pytest.approx(entry, abs=1e-5) for entry in entries]]
    page = opened("writer")
    (whole,) = site.ask("writer", page.get_by_label("Prompt").input_value())
    for language in ("curl", "JavaScript"):
        last = ran(page, language, tmp_path).split("data:")[-1]
        assert json.loads(last)["generated_text"] == whole["generated_text"]


def test_code_is_copied(opened: Open) -> None:
    page = opened("labels", permissions=["clipboard-read", "clipboard-write"])
    type_(page, "Text", "copied")
    page.get_by_role("button", name="Copy").press("Enter")
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#snippet").text_content()


def test_a_browser_asks_for_the_key_and_sends_it_by_itself(browser: Browser, site: Site) -> None:
    wrong = browser.new_context(http_credentials={"username": "", "password": "wrong"})
    refused = wrong.new_page().goto(f"{site.address}/closed/ui")
    assert refused is not None
    assert (refused.status, refused.headers["www-authenticate"].split()[0]) == (401, "Basic")
    wrong.close()
    right = browser.new_context(http_credentials={"username": "", "password": site.key})
    page = right.new_page()
    page.goto(f"{site.address}/closed/ui")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    send(page)
    right.close()
