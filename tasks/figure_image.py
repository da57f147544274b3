"""A figure as PNG, where this machine has a browser that draws it."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path as FilePath

import plotly.graph_objects as go
import plotly.io

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH, HEIGHT = 900, 520  # pixels, before scaling

logger = logging.getLogger("quee.track")


def write_image(figure: go.Figure, path: FilePath) -> bool:
    """Draw `figure` at `path`, in the 3 seconds that a browser takes; returns False, and logs why, where none can."""
    return bool(write_images({path: figure}))


def write_images(figures: Mapping[FilePath, go.Figure]) -> list[FilePath]:
    """Draw each figure at its path, by one browser; returns what was drawn: all, or nothing, and then logs why."""
    named = ", ".join(path.name for path in figures)
    browser = next((name for name in BROWSERS if shutil.which(name)), None)
    if browser is None:
        logger.info("%s is left out: it takes Chromium or Chrome, and there is neither", named)
        return []
    logging.getLogger("choreographer").setLevel(logging.CRITICAL)  # what goes wrong is told here, in one line
    try:
        heights = [figure.layout.height or HEIGHT for figure in figures.values()]
        plotly.io.write_images(list(figures.values()), list(figures), scale=2, width=WIDTH, height=heights)
    except Exception as error:  # of the browser's many; the figure is there as HTML
        for path in figures:
            path.unlink(missing_ok=True)
        logger.warning("%s is left out: %s does not draw it (%s)", named, browser, type(error).__name__)
        return []
    return list(figures)
