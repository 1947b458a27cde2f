"""A headless Chromium for tests of pages, by selenium. Nothing outside the machine is asked."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


def _programs() -> tuple[str, str] | None:
    browser = next(filter(None, map(shutil.which, _NAMES)), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextmanager
def chromium(width: int = 1280, height: int = 900) -> Iterator[Any]:
    """A driver with a fresh profile; the test is skipped where no Chromium is installed."""
    found = _programs()
    if found is None:
        pytest.skip("no chromium and chromedriver here (apt-get install chromium-driver)")
    from selenium import webdriver

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = found[0]
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(executable_path=found[1])
        driver = webdriver.Chrome(options=options, service=service)
        try:
            driver.get("about:blank")
            driver.get_log("performance")  # what the browser's own first page asked for
            resize(driver, width, height)
            yield driver
        finally:
            driver.quit()


def resize(driver: Any, width: int, height: int) -> None:
    """The viewport itself: a window cannot be as narrow as a phone."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def open_file(driver: Any, path: Path) -> None:
    """Opens a page from its file and waits until everything in it is loaded."""
    driver.get(path.resolve().as_uri())
    driver.execute_async_script(
        "const done = arguments[0];"
        "Promise.all([...document.images].map((i) => i.decode().catch(() => null))).then(done);"
    )


def complaints(driver: Any) -> list[str]:
    """What the console got: errors and warnings."""
    return [
        entry["message"]
        for entry in driver.get_log("browser")
        if entry["level"] in ("SEVERE", "WARNING")
    ]


def requests(driver: Any) -> list[str]:
    """Addresses that the page asked for, data in the page itself left out."""
    found = []
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            address = message["params"]["request"]["url"]
            if not address.startswith("data:"):
                found.append(address)
    return found
