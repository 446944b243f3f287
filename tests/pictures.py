"""Take docs' pictures of the playground: python tests/pictures.py [--registry ./registry] [--model emotion@production].

The version has to be there, as after `make quickstart`; the pictures show its own answer to a text.
"""

import argparse
import os
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from banjoray.serving.engine import load
from pages import chromium, served
from replicas import InProcess

DOCS = Path(__file__).parents[1] / "docs"
TEXT = "You kept my letters all these years?"
PICTURES = {
    "playground_wide": (1120, 664, "light"),
    "playground_phone": (360, 760, "light"),
    "playground_dark": (1120, 664, "dark"),
}


def main() -> None:
    """Serve the version in this process and look at its page at every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", default="./registry")
    parser.add_argument("--model", default="emotion@production")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--to", type=Path, default=DOCS)
    asked = parser.parse_args()
    answering = InProcess(load(asked.model, asked.registry, "auto", "auto"), access_log=False)
    with served(answering.app, asked.port) as address, sync_playwright() as driver:
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=chromium(), args=root)
        for name, (width, height, scheme) in PICTURES.items():
            page = browser.new_page(
                viewport={"width": width, "height": height},
                color_scheme="dark" if scheme == "dark" else "light",
                reduced_motion="reduce",
            )
            page.goto(f"{address}/ui")
            expect(page.get_by_role("button", name="Send")).to_be_visible()
            page.get_by_label("Text", exact=True).fill(TEXT)
            # The first answer is slower than those after it.
            for _ in range(3):
                page.get_by_role("button", name="Send").click()
                expect(page.get_by_role("status")).to_have_text("Done")
            page.mouse.move(0, 0)
            page.screenshot(path=asked.to / f"{name}.png", full_page=True)
            page.close()
        browser.close()
    answering.close()


if __name__ == "__main__":
    main()
