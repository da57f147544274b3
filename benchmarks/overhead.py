"""What a sweep spends outside of computing: `python benchmarks/overhead.py` prints it beside its bound, and fails if
that is missed (at most 5 % of a sweep of at least 400 cells).

The sweep runs as `quee sweep` does, on bundled images, an empty store, and a Prefect server of its own, which keeps
its page of the run. Computing is what the stages calibrate, train heads, assemble and evaluate take, the walk of every
branch with the writing of its tables, and the grid between its first unit and its last. All else is outside: Prefect's
server, runs and events, Dask's cluster, MLflow's runs, files and models, the report. It hardly depends on the number of
images. What each branch's task takes beside its walk is stated, too.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from run import Figure, tell

RESULTS = Path(__file__).with_name("overhead_results.json")
LEAST_CELLS = 400
MOST = 0.05
WHOLE_STAGES = ("calibrate", "train heads", "assemble tables", "evaluate")


def configured(images: int, folder: Path) -> dict[str, Any]:
    """720 cells: the 120 paths of three bit-widths over four exits, three splits, two shards."""
    return {
        "name": "overhead",
        "dataset": {"limit": images},
        "backbone": {"exits": [2, 4, 6, 8]},
        "paths": {"bits": [2, 4, 8], "policy": "full"},
        "run": {
            "store": str(folder / "store"),
            "runs": str(folder / "runs"),
            "device": "cpu",
            "shard_images": -(-images // 2),
        },
    }


def measured(images: int, folder: Path) -> list[Figure]:
    """Run the sweep, and compare what it took with what its computing took."""
    # Prefect reads its settings when it is imported
    os.environ.pop("PREFECT_API_URL", None)
    os.environ |= {"PREFECT_HOME": str(folder / "prefect"), "DO_NOT_TRACK": "true"}
    from rich.console import Console

    import tasks.extract
    import tasks.predict_grid
    from flows.full_sweep import run_sweep
    from quee_core.config import parse_config

    walks: list[float] = []
    grid: list[float] = []
    replaced(tasks.extract, "extract_branch", timed, walks)
    replaced(tasks.predict_grid, "run_grid", timed_to_the_last, grid)
    started = time.perf_counter()
    record, _ = run_sweep(parse_config(configured(images, folder), source="benchmark"), Console(quiet=True))
    whole = time.perf_counter() - started
    seconds = {timing.stage: timing.seconds for timing in record.timings}
    [cells] = (timing.computed for timing in record.timings if timing.stage == tasks.extract.STAGE)
    computing = sum(seconds[stage] for stage in WHOLE_STAGES) + sum(walks) + sum(grid)
    return [
        Figure("cells", cells, at_least=LEAST_CELLS),
        Figure("branches, each a task", len(walks)),
        Figure("seconds of the sweep", whole),
        Figure("seconds of its computing", computing),
        Figure("seconds outside of it", whole - computing),
        Figure("share outside of computing", 1 - computing / whole, at_most=MOST),
        Figure("seconds of a branch's task beside its walk", (seconds[tasks.extract.STAGE] - sum(walks)) / len(walks)),
    ]


def replaced(module: ModuleType, name: str, timing: Callable[..., Callable[..., Any]], seconds: list[float]) -> None:
    """Have `module` call its function `name` through `timing`."""
    setattr(module, name, timing(getattr(module, name), seconds))


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """`function`, which adds what each call takes to `seconds`. On a CPU branches are walked one at a time."""

    def counted(*arguments: Any, **options: Any) -> Any:
        with added_to(seconds):
            return function(*arguments, **options)

    return counted


def timed_to_the_last(function: Callable[..., Iterator[Any]], seconds: list[float]) -> Callable[..., Iterator[Any]]:
    """`function`, which adds what its items take, from the first request to the last item, to `seconds`."""

    def counted(*arguments: Any, **options: Any) -> Iterator[Any]:
        with added_to(seconds):
            yield from function(*arguments, **options)

    return counted


@contextmanager
def added_to(seconds: list[float]) -> Iterator[None]:
    """Add what the block takes, if it ends well."""
    started = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description="The share of a sweep that is spent outside of computing.")
    parser.add_argument("--images", type=int, default=4000, help="Images in each split.")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quee-overhead-") as place:
        figures = measured(asked.images, Path(place))
    tell(figures, RESULTS)


if __name__ == "__main__":
    main()
