"""Image files through a deployed router, and its answers in a terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from flows.columns import print_cells
from quee_core.data.decoding import decode
from quee_core.deployment import DeployedRouter
from quee_core.errors import DataError
from quee_core.shipping import Rule


@dataclass(frozen=True)
class FileAnswer:
    """What the router says of one file. path: bit-widths of the segments that ran, second looks behind a ">". cost:
    relative to the full path, of all that ran.
    """

    file: str
    label: str
    probability: float
    path: str
    cost: float


def route_files(deployed: DeployedRouter, files: Sequence[Path], rule: Rule, batch: int) -> Iterator[FileAnswer]:
    """Answer `files` in their order, `batch` at a time. Raises DataError that names a file that is no image."""
    names = deployed.manifest.class_names
    for start in range(0, len(files), batch):
        together = files[start : start + batch]
        routed = deployed.router(torch.stack([deployed.preprocess(read_image(f)) for f in together]), rule)
        for k, file in enumerate(together):
            label = int(routed.label[k])
            yield FileAnswer(
                str(file), names[label], float(routed.probabilities[k, label]), routed.journeys[int(routed.path[k])],
                float(routed.cost[k]),
            )  # fmt: skip


def print_answers(answers: Sequence[FileAnswer], rule: Rule, console: Console) -> None:
    """A table on a terminal, tab-separated lines under a header elsewhere."""
    if not console.is_terminal:
        print_cells(("file", "label", "probability", "path", "cost"), console)
        for a in answers:
            print_cells((a.file, a.label, f"{a.probability:.4f}", a.path, f"{a.cost:.4f}"), console)
        return
    table = Table("file", "label", "probability", "path", "cost", title=str(rule))
    for a in answers:
        table.add_row(a.file, a.label, f"{a.probability:.3f}", a.path, f"{a.cost:.3f}")
    console.print(table)


def read_image(file: Path) -> Image.Image:
    """The image in `file`. Raises DataError that names it if it is none."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); give an image file") from None
    return decode(data, str(file))
