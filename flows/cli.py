"""The `quee` command."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flows.backbones import app as backbones_app
from flows.champion import champion_app
from flows.messages import log_to_stderr, reporting_faults
from quee_core import __version__
from quee_core.errors import ConfigError
from quee_core.record import SweepRecord
from quee_core.whole_files import check_room

PREFECT_ROOM = 32_000_000  # bytes that its database may take in a sweep

app = typer.Typer(
    name="quee",
    help="Give a pretrained vision classifier an input-dependent price: exit early, or continue at fewer bits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(backbones_app, name="backbones")

app.add_typer(champion_app)

ConfigArgument = Annotated[Path, typer.Argument(help="A sweep as YAML, such as configs/quick.yaml.", metavar="CONFIG")]
DataRootOption = Annotated[
    str | None,
    typer.Option("--data-root", help="Folder of the data set's files, for parquet also a URL; replaces dataset.root."),
]
CheckpointOption = Annotated[
    str | None, typer.Option("--checkpoint", help="Weights of the backbone; replaces backbone.checkpoint.")
]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Folder or URL (s3://bucket/prefix) of the store of tables; replaces run.store."),
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N; replaces run.device.")]
DaskOption = Annotated[
    str | None,
    typer.Option("--dask", help="Address of a Dask scheduler whose workers fit the grid; replaces run.dask."),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", help="At most this many images in each split; replaces dataset.limit.")
]
RandomWeightsOption = Annotated[
    bool,
    typer.Option("--random-weights", help="Untrained weights instead of backbone.checkpoint: to try a pipeline."),
]
RunsOption = Annotated[Path, typer.Option("--runs", help="Folder of records and reports.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"quee {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what is done, Prefect's lines included.")
    ] = False,
) -> None:
    """Set up logging and the surroundings of Prefect and MLflow before either is imported."""
    quiet_surroundings(verbose)


@app.command()
@reporting_faults
def sweep(
    config: ConfigArgument,
    data_root: DataRootOption = None,
    checkpoint: CheckpointOption = None,
    store: StoreOption = None,
    device: DeviceOption = None,
    limit: LimitOption = None,
    dask: DaskOption = None,
    random_weights: RandomWeightsOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; compute nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run what CONFIG asks for and the store lacks, then fit, replay and report the front."""
    if dry_run:
        plan(config, data_root, checkpoint, store, device, limit, random_weights, as_json)
        return
    sweep_config = _configured(config, data_root, checkpoint, store, device, limit, random_weights, dask)
    os.environ.setdefault("PREFECT_HOME", str(sweep_config.run.runs.resolve() / ".prefect"))
    check_room(Path(os.environ["PREFECT_HOME"]), PREFECT_ROOM)  # on a full disk its server would keep us waiting
    from flows.full_sweep import run_sweep
    from quee_core.runs import read_registration

    console = Console(stderr=as_json)
    record, report = run_sweep(sweep_config, console)
    if as_json:
        typer.echo(record.model_dump_json(indent=2))
    else:
        print_record(record, console)
    registration = None if sweep_config.backbone.random_weights else read_registration(report.parent)
    if registration is not None:
        console.print(f"router: {registration.line}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"report: {report}", soft_wrap=True, highlight=False)


@app.command()
@reporting_faults
def finetune(
    config: Annotated[Path, typer.Argument(help="A fine-tuning as YAML, such as configs/finetune/cifar10_t2t7.yaml.")],
) -> None:
    """Fine-tune a backbone on a share of a data set, and leave a sweep of it that stays off those images.

    The same command continues a training that was stopped, from its last whole epoch.
    """
    from flows.finetuning import run_finetuning
    from quee_core.finetune_config import load_finetune_config

    run_finetuning(load_finetune_config(config), Console())


@app.command()
@reporting_faults
def plan(
    config: ConfigArgument,
    data_root: DataRootOption = None,
    checkpoint: CheckpointOption = None,
    store: StoreOption = None,
    device: DeviceOption = None,
    limit: LimitOption = None,
    random_weights: RandomWeightsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a sweep would compute: cells, edges, BitOps, time and disk of each stage; and which files it lacks.

    Computes nothing else, and downloads nothing.
    """
    from flows.planning import print_plan
    from quee_core.devices import choose_device
    from quee_core.estimate import estimate
    from quee_core.plan import outline
    from quee_core.store import Store

    asked = _configured(config, data_root, checkpoint, store, device, limit, random_weights)
    planned, missing = outline(asked)
    found = estimate(planned, Store.open(asked.run.store), choose_device(asked.run.device), missing)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
        return
    console = Console()
    print_plan(found, f"plan of {config}", console)
    unread = "images at a URL are not read for a plan; the store may have tables of them"
    _print_notes([*planned.cautions, *([unread] if asked.dataset.url else [])], console)


@app.command()
@reporting_faults
def report(
    run: Annotated[str, typer.Argument(help="Name of a run, or the path of its record.json.", metavar="RUN")],
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Print a finished run's front and write its report anew."""
    from quee_core.report.page import render
    from quee_core.runs import find_record, report_path, write_text

    record, folder = find_record(run, runs)
    page = report_path(folder)
    write_text(page, render(record))
    if as_json:
        typer.echo(record.model_dump_json(indent=2))
        return
    console = Console()
    print_record(record, console)
    console.print(f"report: {page}", soft_wrap=True, highlight=False)


@app.command()
@reporting_faults
def compare(
    runs_named: Annotated[
        list[str],
        typer.Argument(
            help="Names of runs, or paths of their record.json; those of one data set are pooled.", metavar="RUN..."
        ),
    ],
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="A run whose baselines the cost is compared with too; may be given repeatedly."),
    ] = None,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Measure RUNs' fronts again, and say what QuEE gains over each baseline, over several seeds of splits."""
    from flows.comparing import print_comparisons
    from quee_core.comparison import compare as compare_runs
    from quee_core.comparison import run_fronts
    from quee_core.runs import find_record

    found = compare_runs(
        [run_fronts(*find_record(name, runs)) for name in runs_named],
        [run_fronts(*find_record(name, runs)) for name in against or []],
    )
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=2))
    else:
        print_comparisons(found, Console())


@app.command()
@reporting_faults
def route(
    run: Annotated[str, typer.Argument(help="Name of a run, or the path of its router folder.", metavar="RUN")],
    images: Annotated[list[Path], typer.Argument(help="Image files to answer.", metavar="IMAGE...")],
    price: Annotated[
        float | None,
        typer.Option("--price", help="λ: how many errors one full path is worth. Default 0: all accuracy."),
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="Mean relative cost not to exceed, instead of --price.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images that go through the network together.")] = 64,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Answer IMAGEs with a finished run's router: label, probability, the path that each one took, its cost."""
    from flows.routing import print_answers, route_files
    from quee_core.deployment import load_router
    from quee_core.devices import choose_device
    from quee_core.runs import find_router

    if price is not None and budget is not None:
        raise ConfigError("--price and --budget: give one of the two")
    deployed = load_router(find_router(run, runs), choose_device(device))
    point = deployed.point_at(price or 0.0) if budget is None else deployed.point_within(budget)
    answers = list(route_files(deployed, images, point.as_rule(), batch))
    _print_notes(deployed.manifest.cautions, Console(stderr=True))
    if as_json:
        typer.echo(json.dumps([asdict(answer) for answer in answers], indent=2))
    else:
        print_answers(answers, point.as_rule(), Console())


@app.command()
@reporting_faults
def explain(
    image: Annotated[Path, typer.Argument(help="An image file.", metavar="IMAGE")],
    run: Annotated[str, typer.Option("--run", help="Name of a run, or the path of its router folder.")],
    price: Annotated[
        float, typer.Option("--price", help="λ: how many errors one full path is worth to the gates.")
    ] = 0.1,
    page: Annotated[
        Path | None,
        typer.Option("--page", help="Where the figure goes; by default IMAGE's name with .walk.html, here."),
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Draw the figure as a picture too, beside the page.")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Show how the gates of a finished run decide about IMAGE: what each saw, the loss of each way on, its choice."""
    from flows.drawing import print_walk, write_figures
    from flows.routing import read_image
    from quee_core.deployment import load_router
    from quee_core.devices import choose_device
    from quee_core.report import paper
    from quee_core.runs import find_router
    from quee_core.walks import explain as walk_through

    target = page or Path(f"{image.stem}.walk.html")
    if target.suffix != ".html":
        raise ConfigError(f"--page {target}: a figure is a page; end its name in .html")
    deployed = load_router(find_router(run, runs), choose_device(device))
    manifest, router = deployed.manifest, deployed.router
    walk = walk_through(router, deployed.preprocess(read_image(image)), price)
    told = paper.walk_caption(manifest, image.name)
    figure = paper.walk(walk, manifest.class_names, router.policy.tree.paths, told)
    written = write_figures({target.stem: figure}, target.parent, png=png)
    _print_notes(manifest.cautions, Console(stderr=True))
    if as_json:
        typer.echo(json.dumps({**asdict(walk), "label": manifest.class_names[walk.answer.label]}, indent=2))
        return
    console = Console()
    print_walk(walk, manifest.class_names, console)
    for file in written:
        console.print(f"figure: {file}", soft_wrap=True, highlight=False)


@app.command()
@reporting_faults
def figures(
    run: Annotated[str, typer.Argument(help="Name of a run, or the path of its record.json.", metavar="RUN")],
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            help="Mean relative cost of the operating point of Fig. 1 and 2; else the cheapest within a point "
            "of the best.",
        ),
    ] = None,
    image: Annotated[
        int | None, typer.Option("--image", help="Sample id of the test image whose walk is shown; else a long walk.")
    ] = None,
    gate: Annotated[
        str | None, typer.Option("--gate", help="Gate whose clusters are shown, such as 4-4; by default the first.")
    ] = None,
    store: StoreOption = None,
    png: Annotated[bool, typer.Option("--png/--no-png", help="Pictures too, where there is a Chromium.")] = True,
    track: Annotated[
        bool, typer.Option("--track", help="Add them to the run in MLflow that the sweep left, if there is one.")
    ] = False,
    runs: RunsOption = Path("runs"),
) -> None:
    """Draw the paper's figures 1 to 5 anew from what a finished run left: its tables, its gates, its grid."""
    from flows.drawing import FOLDER, paper_figures, write_figures
    from quee_core.paths import Path as TreePath
    from quee_core.runs import find_record
    from quee_core.store import Store
    from quee_core.studies import FinishedTables

    record, folder = find_record(run, runs)
    tables = FinishedTables.of(record, folder)
    kept = Store.open(store or tables.config.run.store)
    at = None if gate is None else TreePath.parse(gate)
    drawn = paper_figures(tables, kept, budget=budget, image=image, gate=at)
    written = write_figures(drawn, folder / FOLDER, png=png)
    console = Console()
    for file in written:
        console.print(f"figure: {file}", soft_wrap=True, highlight=False)
    if track:
        from tasks.track import add_figures

        known = add_figures(tables.config, record, folder / FOLDER)
        console.print(f"tracked: run {known}" if known else "not tracked: MLflow has no run of this record")


@app.command()
@reporting_faults
def datasets(as_json: JsonOption = False) -> None:
    """List the data sets that can be swept, and which of them need files of yours."""
    from quee_core.data.datasets import DATASETS

    if as_json:
        listed = [{"name": n, "needs_root": e.needs_root, "description": e.description} for n, e in DATASETS.items()]
        typer.echo(json.dumps(listed, indent=2))
        return
    table = Table("name", "files", "description")
    for name, entry in DATASETS.items():
        table.add_row(name, "yours (--data-root)" if entry.needs_root else "bundled", entry.description)
    Console().print(table)


def print_record(record: SweepRecord, console: Console) -> None:
    """The front at each budget with its interval, against the best baseline there, on the same test images."""
    rows = [
        (
            f"{row.budget:.3f}",
            f"{100 * row.accuracy:.2f}",
            f"[{100 * row.low:.2f}, {100 * row.high:.2f}]",
            f"{100 * row.baseline_accuracy:.2f}",
            row.baseline,
            f"{100 * row.difference:+.2f}",
            f"[{100 * row.difference_low:+.2f}, {100 * row.difference_high:+.2f}]",
        )
        for row in record.budgets
    ]
    head = ("budget", "accuracy %", "95 %", "baseline %", "best baseline", "difference", "95 %")
    title = f"{record.name}: {record.backbone} on {record.dataset}, n = {record.splits['test']} test images"
    if not console.is_terminal:
        console.print(title, highlight=False, soft_wrap=True)
        for row in (head, *rows):
            console.print("  ".join(f"{cell:>16}" for cell in row), highlight=False, soft_wrap=True, markup=False)
    else:
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        console.print(table)
    console.print(
        f"budgets are {record.cost_unit} relative to the full path at {max(record.bits)} bits; "
        f"the cheapest path costs {record.cheapest_cost:.3f}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if record.baselines:
        needs = ", ".join(f"{own.method} {own.trainings} in {own.seconds:.1f} s" for own in record.baselines)
        console.print(
            f"baselines, by the labels of {record.baselines[0].labels} images; trainings, and time to fit: {needs}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if failed := [row for row in record.grid if row.failure is not None]:
        console.print(
            f"note: {len(failed)} of {len(record.grid)} grid points could not be fitted; the first, "
            f"{failed[0].described}: {failed[0].failure}",
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
    _print_notes(record.cautions, console)


def _print_notes(notes: Iterable[str], console: Console) -> None:
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Run the command; the console script of the package."""
    app()


def _configured(
    config: Path,
    data_root: str | None,
    checkpoint: str | None,
    store: str | None,
    device: str | None,
    limit: int | None,
    random_weights: bool,
    dask: str | None = None,
) -> Any:
    from quee_core.config import load_config, parse_config

    raw = load_config(config).model_dump(mode="python", exclude_unset=True)
    at_url = data_root is not None and "://" in data_root
    if data_root is not None:
        raw.setdefault("dataset", {})["url"] = data_root if at_url else None
    for section, field, value in (
        ("dataset", "root", None if at_url else data_root),
        ("backbone", "checkpoint", checkpoint),
        ("run", "store", store),
        ("run", "device", device),
        ("dataset", "limit", limit),
        ("run", "dask", dask),
    ):
        if value is not None:
            raw.setdefault(section, {})[field] = value
    if random_weights:
        given = {k: v for k, v in raw.get("backbone", {}).items() if k not in ("checkpoint", "pretrained")}
        raw["backbone"] = given | {"random_weights": True} | ({} if checkpoint is None else {"checkpoint": checkpoint})
    return parse_config(raw, source=str(config))


def quiet_surroundings(verbose: bool) -> None:
    """Settings of Prefect, MLflow and OpenMP where the environment has none, to be made before they are imported."""
    defaults = {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
        "PREFECT_LOGGING_LEVEL": "INFO" if verbose else "WARNING",
        "PREFECT_INTERNAL_LOGGING_LEVEL": "ERROR" if verbose else "CRITICAL",  # each event that a server did not take
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING" if verbose else "CRITICAL",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # by default it waits four minutes for a server that is not there
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "quee_core,quee",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # a busy machine is slow, not broken
    }
    if "OMP_WAIT_POLICY" not in os.environ:
        # threads that spin longer for each other gain nothing, and make two commands on two cores seven times slower
        defaults["GOMP_SPINCOUNT"] = "3000"
    if "PREFECT_API_URL" not in os.environ:
        defaults["PREFECT_LOGGING_TO_API_ENABLED"] = "false"  # a temporary server's logs are nobody's to read
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    log_to_stderr(verbose=verbose)


if __name__ == "__main__":
    main()
