"""Take the pictures of the README: Prefect's page of a run, and the fronts of several sweeps in MLflow's chart.

    .venv/bin/python scripts/screenshots.py [--work FOLDER]

It starts Prefect and MLflow on loopback as `make ui` does, runs the sweeps of `SWEEPS` (small but real: some minutes on
two cores, seconds when the work folder holds them), and opens their pages in Debian's chromium without a window. Needs
the packages of `dev`, chromium and chromium-driver. A page that does not show what is looked for is an error.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars")  # fmt: skip
WIDTH = 1400
PATIENCE = 120.0  # seconds
IMAGES = 1000  # of each split
SWEEPS = {"bits-8": [8], "bits-4-8": [4, 8], "bits-2-4-8": [2, 4, 8]}  # the last is the one whose run is shown


class Page:
    """A browser without a window."""

    def __init__(self) -> None:
        options = ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in FLAGS:
            options.add_argument(flag)
        self.driver = Chrome(options=options, service=Service(DRIVER))

    def open(self, url: str, height: int) -> None:
        """Load a page in a window of `height`."""
        size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(url)

    def find(self, selector: str, text: str = "") -> WebElement:
        """The first element in sight that `selector` finds and whose text or label has `text` in it."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for element in self.driver.find_elements(By.CSS_SELECTOR, selector):
                if element.is_displayed() and text in f"{element.text} {element.get_attribute('aria-label')}":
                    return element
            time.sleep(0.2)
        raise SystemExit(f"{self.driver.current_url}: no {selector} with {text!r} within {PATIENCE:.0f} s")

    def take(self, path: Path) -> None:
        """Save what is in sight, once it has stopped moving."""
        deadline = time.monotonic() + PATIENCE
        before, now = b"", self.driver.get_screenshot_as_png()
        while before != now:
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.driver.current_url}: still moving after {PATIENCE:.0f} s")
            time.sleep(2)
            before, now = now, self.driver.get_screenshot_as_png()
        path.write_bytes(now)
        print(f"{path}: {len(now) / 1000:.0f} kB")


def picture_run(page: Page, prefect: str, run: str, folder: Path) -> None:
    """Prefect's page of a run: when which task ran, and the artifacts that the run left."""
    page.open(f"{prefect}/runs/flow-run/{run}", 1000)
    page.find("canvas")
    page.find("[role=tab], .p-tab, button, a", "Artifacts").click()
    page.find("body", "-picture")
    page.take(folder / "prefect-run.png")


def picture_front(page: Page, mlflow: str, experiment: str, folder: Path) -> None:
    """MLflow's chart of `front_quee`, all sweeps in one."""
    page.open(f"{mlflow}/#/experiments/{experiment}/runs?compareRunsMode=CHART&workflowType=machine_learning", 680)
    page.find("button", "Close").click()  # MLflow's assistant
    page.find("input[placeholder='Search metric charts']").send_keys("front_quee")
    page.find(".js-plotly-plot .scatterlayer .trace")
    page.find("[data-component-id=fullscreen_button_chartcard]").click()
    hidden = "<style>.modebar, [data-assistant-ui] {display: none !important}</style>"  # they lie over what is shown
    page.driver.execute_script("document.head.insertAdjacentHTML('beforeend', arguments[0])", hidden)
    page.find("[role=dialog] .js-plotly-plot .scatterlayer .trace")
    page.take(folder / "mlflow-front.png")


def write_sweeps(work: Path, mlflow: str) -> list[Path]:
    """configs/quick.yaml with fewer images, once for each set of bit-widths."""
    files = []
    for name, bits in SWEEPS.items():
        sweep = yaml.safe_load((ROOT / "configs" / "quick.yaml").read_text("utf-8"))
        sweep |= {"name": name, "run": {"store": str(work / "store"), "runs": str(work / "runs"), "mlflow_uri": mlflow}}
        sweep["dataset"]["limit"] = IMAGES
        sweep["paths"]["bits"] = bits
        files.append(work / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(sweep), "utf-8")
    return files


@contextmanager
def servers(work: Path, prefect: int, mlflow: int) -> Iterator[None]:
    """`make ui` at these ports, on the runs of `work`."""
    command = [BIN / "python", "-m", "infra.ui", "--runs", work / "runs"]
    command += ["--prefect-port", prefect, "--mlflow-port", mlflow]
    with (work / "servers.log").open("wb") as log:
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + PATIENCE
        while "Ctrl-C ends both" not in (work / "servers.log").read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the servers do not answer; see {work / 'servers.log'}")
            time.sleep(0.5)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def latest_run(prefect: str, name: str) -> str:
    """Id of the latest run of that name."""
    body = {"flow_runs": {"name": {"any_": [name]}}, "sort": "START_TIME_DESC", "limit": 1}
    request = urllib.request.Request(
        f"{prefect}/api/flow_runs/filter", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        found: list[dict[str, Any]] = json.load(answer)
    return str(found[0]["id"])


def main() -> None:
    """Run the sweeps that the work folder lacks, and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "screenshots", help="sweeps (%(default)s)")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the pictures go (%(default)s)")
    parser.add_argument("--prefect-port", type=int, default=24200, help="port of Prefect (%(default)s)")
    parser.add_argument("--mlflow-port", type=int, default=25000, help="port of MLflow (%(default)s)")
    asked = parser.parse_args()
    work: Path = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    prefect, mlflow = f"http://127.0.0.1:{asked.prefect_port}", f"http://127.0.0.1:{asked.mlflow_port}"
    with servers(work, asked.prefect_port, asked.mlflow_port):
        for file in write_sweeps(work, mlflow):
            if not (work / "runs" / file.stem / "registration.json").is_file():
                subprocess.run(
                    [BIN / "quee", "sweep", file], check=True, env=os.environ | {"PREFECT_API_URL": f"{prefect}/api"}
                )
        page = Page()
        try:
            picture_run(page, prefect, latest_run(prefect, list(SWEEPS)[-1]), asked.docs)
            picture_front(page, mlflow, "1", asked.docs)
        finally:
            page.driver.quit()


if __name__ == "__main__":
    main()
