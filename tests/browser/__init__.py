"""A real browser for the tests of a page: headless Chromium from the system, driven by selenium, without a network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
PHONE, DESKTOP = (360, 740), (1280, 900)


def missing() -> str:
    """Why there is no browser to test with; "" if there is one."""
    try:
        import axe_core_python  # noqa: F401
        import selenium  # noqa: F401
    except ImportError as error:
        return f"{error}: pip install -e '.[dev]'"
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no {' and no '.join(lacking)}: apt-get install chromium chromium-driver" if lacking else ""


class Browser:
    """One window, in which pages are opened from files."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(
        self, path: Path, *, size: tuple[int, int] = DESKTOP, scheme: str = "light", media: str = "screen"
    ) -> None:
        """Load a page under the given window, colour scheme and medium."""
        self._tell(
            "Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        width, height = size
        self._tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.driver.get_log("browser")  # of the page before
        self.driver.get(path.resolve().as_uri())

    def run(self, script: str) -> Any:
        """What a JavaScript function body returns."""
        return self.driver.execute_script(script)

    def log(self) -> list[dict[str, Any]]:
        """Console messages since the page was opened."""
        return self.driver.get_log("browser")

    def axe(self) -> list[dict[str, Any]]:
        """axe-core's violations on the open page."""
        import axe_core_python

        source = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
        self._tell("Page.setBypassCSP", enabled=True)
        self.driver.execute_script(source)
        found = self.driver.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
        return found["violations"]

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        import base64

        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """The page as it is printed."""
        import base64

        return base64.b64decode(self.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])

    def _tell(self, command: str, **parameters: Any) -> None:
        self.driver.execute_cdp_cmd(command, parameters)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a new profile in an empty folder; closed at the end."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=ChromeService(executable_path=shutil.which("chromedriver")))
    try:
        driver.set_script_timeout(60)
        yield Browser(driver)
    finally:
        driver.quit()
