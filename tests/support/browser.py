"""A real headless Chromium that opens a page of a file or of this machine, at any width and in either colour scheme."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


def require_chromium() -> None:
    """Skip a test where there is no Chromium to open a page with."""
    pytest.importorskip("selenium", reason="selenium is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium chromium-driver)")


def open_page(path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> Any:
    """Open a page of a file; see :func:`open_url`."""
    return open_url(path.absolute().as_uri(), width, height, dark)


@contextmanager
def open_url(url: str, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Any]:
    """Open a page and yield the driver of its browser, which reaches no network but this machine by its number."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        # Every name leads nowhere.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(executable_path=DRIVER))
    try:
        browser.set_page_load_timeout(120)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        browser.get(url)
        yield browser
    finally:
        browser.quit()


def read_complaints(browser: Any) -> list[str]:
    """Return what the page's console says of warnings and errors."""
    return [
        entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")
    ]


def take_screenshot(browser: Any, path: Path) -> None:
    """Write a picture of the whole page."""
    import base64

    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
    path.write_bytes(base64.b64decode(shot["data"]))
