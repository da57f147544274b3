"""Figures as PNG, where kaleido and a browser for it are installed."""

import logging
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path as FilePath

import plotly.graph_objects as go
import plotly.io

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

logger = logging.getLogger("quee.track")


def write_images(figures: Mapping[str, go.Figure], folder: FilePath) -> bool:
    """Write every figure as NAME.png into `folder`; returns False, and logs why, where this machine cannot."""
    if (missing := _missing()) is not None:
        logger.info("figures as PNG are left out: %s", missing)
        return False
    try:
        plotly.io.write_images(list(figures.values()), [folder / f"{name}.png" for name in figures], scale=2)
    except Exception as error:  # of the browser's many; the figures are there as HTML
        for name in figures:
            (folder / f"{name}.png").unlink(missing_ok=True)
        logger.warning("figures as PNG are left out: %s", " ".join(str(error).split()) or type(error).__name__)
        return False
    return True


def _missing() -> str | None:
    if find_spec("kaleido") is None:
        return "kaleido is not installed (pip install kaleido)"
    if not any(shutil.which(name) for name in BROWSERS):
        return "kaleido needs Chromium or Chrome, and there is neither"
    return None
