"""A person at Open WebUI, played by headless Chromium. Needs `playwright`, and nothing of ours.

Each line on standard input is an order `{"do": "chat", "text": …, "expect": …, "picture": …}`; each is answered by one
line of JSON with what the page shows.
"""

import json
import sys
from typing import Any

from playwright.sync_api import Page, TimeoutError, sync_playwright

ANSWER_TIMEOUT_MS = 120_000


def main(url: str, chromium: str) -> None:
    """Carry out orders until there are none."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1200, "height": 800}, locale="en-US")
        for line in sys.stdin:
            print(json.dumps(chat(page, url, json.loads(line))), flush=True)
        browser.close()


def chat(page: Page, url: str, order: dict[str, Any]) -> dict[str, Any]:
    """A new chat with one message. Waits until the page shows the expected words, or an answer if none are named."""
    page.goto(url, wait_until="domcontentloaded")
    box = page.locator("#chat-input")
    box.wait_for(timeout=60_000)
    dismiss_news(page)
    box.click()
    if len(order["text"]) > 200:  # a person pastes a long text
        page.evaluate("text => navigator.clipboard.writeText(text).catch(() => {})", order["text"])
        box.evaluate("(node, text) => document.execCommand('insertText', false, text)", order["text"])
    else:
        page.keyboard.type(order["text"])
    page.keyboard.press("Enter")
    shown = True
    try:
        if order.get("expect"):
            page.get_by_text(order["expect"]).first.wait_for(timeout=ANSWER_TIMEOUT_MS)
        else:
            page.locator("button[aria-label='Good Response']").last.wait_for(timeout=ANSWER_TIMEOUT_MS)
    except TimeoutError as error:  # the caller decides; the picture shows what was there instead
        shown = False
        print(error, file=sys.stderr)
    page.wait_for_timeout(order.get("then_wait_ms", 500))
    page.screenshot(path=order["picture"])
    return {"shown": shown, "title": page.title(), "text": page.inner_text("body")}


def dismiss_news(page: Page) -> None:
    """Close the dialog about what is new in this release, which covers the first page."""
    button = page.get_by_role("button", name="Okay, Let's Go!")
    if button.count():
        button.click()


if __name__ == "__main__":
    main(*sys.argv[1:])
