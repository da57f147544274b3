"""A figure as PNG, where this machine has a browser that draws it."""

import logging
import shutil
from pathlib import Path as FilePath

import plotly.graph_objects as go
import plotly.io

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

logger = logging.getLogger("quee.track")


def write_image(figure: go.Figure, path: FilePath) -> bool:
    """Draw `figure` at `path`, in the 3 seconds that a browser takes; returns False, and logs why, where none can."""
    if not any(shutil.which(name) for name in BROWSERS):
        logger.info("%s is left out: it takes Chromium or Chrome, and there is neither", path.name)
        return False
    try:
        plotly.io.write_image(figure, path, scale=2)
    except Exception as error:  # of the browser's many; the figure is there as HTML
        path.unlink(missing_ok=True)
        logger.warning("%s is left out: %s", path.name, " ".join(str(error).split()) or type(error).__name__)
        return False
    return True
