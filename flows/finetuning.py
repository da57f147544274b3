"""Fine-tuning in a terminal: a line for each epoch, and what to do with the weights."""

from pathlib import Path

from rich.console import Console

from flows.columns import print_cells
from quee_core.finetune_config import FinetuneConfig
from quee_core.finetuning import WEIGHTS, prepare
from quee_core.locks import alone
from quee_core.whole_files import check_room
from tasks.finetune import SWEEP, finetune

LOCK = ".finetuning.lock"
ROOM = 64_000_000  # bytes, without which a training would not get far


def run_finetuning(config: FinetuneConfig, console: Console) -> Path:
    """Train as `config` says, its progress on `console`; returns the weights file.

    Raises the QueeError that names what does not fit before anything is trained, or what ended the training.
    """
    folder = config.run.runs / config.name
    training = prepare(config)
    check_room(folder, ROOM)
    say(console, f"{config.backbone.name} on {config.dataset.name}, {training.device}; accuracy on held-out images")
    print_cells(("epoch", "loss", "accuracy %", "95 %", "n", "images/s"), console)
    with alone(folder / LOCK):
        for epoch in finetune(training, folder):
            low, high = epoch.interval
            cells = (
                str(epoch.number), f"{epoch.loss:.4f}", f"{100 * epoch.accuracy:.2f}",
                f"[{100 * low:.2f}, {100 * high:.2f}]", str(epoch.n), f"{epoch.images_per_second:.0f}",
            )  # fmt: skip
            print_cells(cells, console)
    say(console, f"weights: {folder / WEIGHTS}")
    say(console, f"sweep them: quee sweep {folder / SWEEP}")
    return folder / WEIGHTS


def say(console: Console, line: str) -> None:
    """A line as it is."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)
