"""A real Chromium without a window, and what it wrote into its console."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
# Where pictures go that somebody wants to look at after the run.
SCREENSHOTS_ENV = "CONSOLE_SCREENSHOTS"
_WAIT_S = 20.0
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1440,1000",
)  # fmt: skip


@dataclass(slots=True)
class Browser:
    """One tab."""

    driver: Chrome
    pictures: Path

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def find_all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def click(self, selector: str) -> None:
        self.wait(lambda: self.find(selector).is_displayed(), selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", self.find(selector))
        self.find(selector).click()

    def type(self, selector: str, text: str) -> None:
        self.find(selector).send_keys(text)

    def wait(self, holds: Any, what: str, timeout_s: float = _WAIT_S) -> None:
        """Until `holds()` is true."""
        redrawn = (StaleElementReferenceException,)
        waiting = WebDriverWait(self.driver, timeout_s, poll_frequency=0.1, ignored_exceptions=redrawn)
        waiting.until(lambda _: holds(), f"waited for: {what}")

    def run(self, script: str, *arguments: Any) -> Any:
        """The result of a script; a promise is awaited."""
        return self.driver.execute_script(script, *arguments)

    def colours(self, scheme: str) -> None:
        """What the person prefers: `light` or `dark`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def picture(self, name: str) -> Path:
        """The whole page as a picture."""
        file = self.pictures / f"{name}.png"
        self.driver.save_screenshot(str(file))
        return file

    def complaints(self) -> list[str]:
        """What the browser has logged since the last time: errors of scripts, breaches of the policy, failed loads."""
        entries: list[dict[str, Any]] = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in entries]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A new Chromium with an empty profile."""
    pictures = Path(os.environ.get(SCREENSHOTS_ENV) or folder / "screenshots")
    pictures.mkdir(parents=True, exist_ok=True)
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*_FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, ChromeService(DRIVER, log_output=str(folder / "chromedriver.log")))
    try:
        driver.set_script_timeout(_WAIT_S)
        yield Browser(driver, pictures)
    finally:
        driver.quit()
