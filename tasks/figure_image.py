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
    browser = next((name for name in BROWSERS if shutil.which(name)), None)
    if browser is None:
        logger.info("%s is left out: it takes Chromium or Chrome, and there is neither", path.name)
        return False
    logging.getLogger("choreographer").setLevel(logging.CRITICAL)  # what goes wrong is told here, in one line
    try:
        plotly.io.write_image(figure, path, scale=2)
    except Exception as error:  # of the browser's many; the figure is there as HTML
        path.unlink(missing_ok=True)
        logger.warning("%s is left out: %s does not draw it (%s)", path.name, browser, type(error).__name__)
        return False
    return True
