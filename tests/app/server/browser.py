"""The browser page in a real Chromium, as a user has it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from stub_server import Stub

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="no chromium with its chromedriver on this machine"
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def contrast(one: list[int], other: list[int]) -> float:
    """WCAG 2's ratio."""

    def luminance(rgb: list[int]) -> float:
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05

    low, high = sorted((luminance(one), luminance(other)))
    return high / low


COLOURS = """
    const rgb = (value) => value.match(/[0-9.]+/g).slice(0, 3).map(Number);
    const root = getComputedStyle(document.documentElement);
    const back = (node) => {
      for (; node; node = node.parentElement) {
        const value = getComputedStyle(node).backgroundColor;
        if (!/, 0\\)$/.test(value)) return rgb(value);
      }
    };
    return [...document.querySelectorAll("body *")]
      .filter((node) => node.checkVisibility() && [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim()))
      .map((node) => [node.className || node.id || node.tagName, rgb(getComputedStyle(node).color), back(node)]);
"""


class Page:
    """The page as a user has it."""

    def __init__(self, driver: webdriver.Chrome, stub: Stub) -> None:
        self.driver, self.stub = driver, stub

    def open(self) -> None:
        self.driver.get(self.stub.url)
        self.until(lambda: self("#model").text == "tiny-q8_0.gguf")
        self.until(lambda: self("#pages").get_attribute("data-pages"))

    def __call__(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def js(self, script: str, *args: object) -> object:
        return self.driver.execute_script(script, *args)

    def press(self, *keys: str) -> None:
        """Keys go to whatever has the focus."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def until(self, holds: Callable[[], object], seconds: float = 5) -> object:
        end = time.monotonic() + seconds
        while True:
            try:
                if value := holds():
                    return value
            except StaleElementReferenceException:
                pass
            assert time.monotonic() < end, f"not in {seconds} s; the page says: {self('body').text}"
            time.sleep(0.02)

    def ask(self, text: str) -> None:
        self("#prompt").send_keys(text, Keys.ENTER)

    def ended(self) -> bool:
        return not self.all(".growing") and self("#send").is_displayed()

    def answered(self, text: str) -> None:
        before = len(self.all(".assistant"))
        self.ask(text)
        self.until(lambda: len(self.all(".assistant")) > before and self.ended())

    def texts(self, selector: str) -> list[str]:
        return [found.get_property("textContent") for found in self.all(selector)]

    def button(self, words: str) -> WebElement:
        return next(b for b in self.all("button") if b.is_displayed() and b.text == words)

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def scheme(self, name: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def pixel(self, page: int, x: float = 0.5, y: float = 0.5) -> tuple[int, ...]:
        """Position of a page's cell."""
        script = """
            const [page, x, y] = arguments, c = document.getElementById("pages"), { columns, pitch } = c.dataset;
            const left = (page % columns + x) * pitch, top = (Math.floor(page / columns) + y) * pitch;
            return [...c.getContext("2d").getImageData(Math.floor(left), Math.floor(top), 1, 1).data].slice(0, 3);
        """
        return tuple(self.js(script, page, x, y))  # type: ignore[arg-type]

    def hard_to_read(self) -> set[str]:
        """Elements whose text has too little contrast, by class, id or tag."""
        found = self.js(COLOURS)
        return {name for name, words, back in found if contrast(words, back) < 4.5}  # type: ignore[attr-defined]

    def nameless(self) -> list[str | None]:
        """Controls that a screen reader has no name for."""
        return [
            found.get_attribute("outerHTML")
            for found in self.all("button, input, select, textarea, summary, canvas[tabindex]")
            if found.is_displayed() and not found.accessible_name
        ]


@contextmanager
def chromium(folder: Path) -> Iterator[webdriver.Chrome]:
    """A browser whose profile is in a folder."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in [*FLAGS, f"--user-data-dir={folder}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=str(CHROMEDRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


@contextmanager
def new_page(driver: webdriver.Chrome, stub: Stub) -> Iterator[Page]:
    """A browser that has never seen the page; at the end, a console without complaints."""
    stub.reset()
    page = Page(driver, stub)
    page.size(1280, 800)
    page.scheme("light")
    driver.get(stub.url + "favicon.svg")
    page.js("localStorage.clear(); sessionStorage.clear()")
    driver.get_log("browser")
    page.open()
    yield page
    complaints = [entry["message"] for entry in driver.get_log("browser") if entry["source"] != "network"]
    assert complaints == []
