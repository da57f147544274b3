"""`quee champion`: which router is in service for each data set, and by hand another one, or the one before."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flows.columns import print_cells
from flows.messages import reporting_faults
from quee_core.errors import ConfigError

if TYPE_CHECKING:  # imported by the commands: MLflow takes seconds
    from tasks.registry import Champion, RouterRegistry

champion_app = typer.Typer(
    name="champion",
    help="Show, promote or roll back the registered router that is in service for a data set.",
    no_args_is_help=True,
)

DatasetArgument = Annotated[
    str, typer.Argument(help="Data set, as in the model's name quee-router-DATASET.", metavar="DATASET")
]
UriOption = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        envvar="MLFLOW_TRACKING_URI",
        help="MLflow's address; by default sqlite:///RUNS/mlflow.db, as of a sweep.",
    ),
]
RunsOption = Annotated[Path, typer.Option("--runs", help="Folder of runs, whose mlflow.db is the default.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@champion_app.command()
@reporting_faults
def show(
    dataset: Annotated[
        str | None, typer.Argument(help="Data set; all of them by default.", metavar="[DATASET]")
    ] = None,
    tracking_uri: UriOption = None,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Show the champion of DATASET, or of every data set: version, backbone, run, front, since when."""
    with _registry(tracking_uri, runs) as registry:
        found = {name: registry.champion(name) for name in ([dataset] if dataset else registry.datasets())}
    if as_json:
        typer.echo(json.dumps([None if one is None else _plain(one) for one in found.values()], indent=2))
    else:
        _print(found, Console())


@champion_app.command()
@reporting_faults
def promote(
    dataset: DatasetArgument,
    version: Annotated[int, typer.Argument(help="Version of the registered model.", metavar="VERSION", min=1)],
    tracking_uri: UriOption = None,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Make VERSION the champion of DATASET whatever its front; the version before is noted, for `rollback`."""
    with _registry(tracking_uri, runs) as registry:
        wanted = registry.version(dataset, version)
        before = registry.champion(dataset)
        if before is None or before.version != str(wanted.version):
            registry.promote(dataset, str(wanted.version), "promoted by hand")
        after = registry.champion(dataset)
    _told(after, before, as_json)


@champion_app.command()
@reporting_faults
def rollback(
    dataset: DatasetArgument,
    tracking_uri: UriOption = None,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Put the champion of DATASET that was before the present one back in service."""
    with _registry(tracking_uri, runs) as registry:
        before = registry.champion(dataset)
        registry.roll_back(dataset)
        after = registry.champion(dataset)
    _told(after, before, as_json)


def _uri(given: str | None, runs: Path) -> str:
    """The address given, or that of the database in `runs`, which must be there: MLflow would make an empty one."""
    from tasks.mlflow_server import database_uri

    if given is None:
        given = database_uri(runs)
    database = Path(given.removeprefix("sqlite:///"))
    if given.startswith("sqlite:///") and not database.is_file():
        raise ConfigError(f"{database}: no MLflow database there; run a sweep first, or give --runs or --tracking-uri")
    return given


@contextmanager
def _registry(tracking_uri: str | None, runs: Path) -> Iterator["RouterRegistry"]:
    """The registry at the address given, or in the database of `runs`; its faults are told in a line."""
    from tasks.mlflow_server import client_of, mlflow_faults
    from tasks.registry import RouterRegistry

    uri = _uri(tracking_uri, runs)
    with mlflow_faults(uri, "start that server, or name another with --tracking-uri"):
        yield RouterRegistry(client_of(uri))


def _plain(champion: "Champion") -> dict[str, Any]:
    shown = {"backbone": champion.backbone, "run": champion.run, "front": champion.front}
    return {**{k: v for k, v in asdict(champion).items() if k != "tags"}, **shown}


def _told(after: "Champion | None", before: "Champion | None", as_json: bool) -> None:
    assert after is not None  # it has just been set
    was = None if before is None else before.version
    if as_json:
        typer.echo(json.dumps({**_plain(after), "before": was}, indent=2))
    elif was == after.version:
        typer.echo(f"{after.model}: version {after.version} is the champion already")
    else:
        typer.echo(
            f"{after.model}: version {after.version} is the champion; before it {f'version {was}' if was else 'none'}"
        )


def _print(found: dict[str, "Champion | None"], console: Console) -> None:
    head = ("data set", "version", "backbone", "run", "since", "how", "front")
    rows = [
        (name, "no champion", "", "", "", "", "")
        if one is None
        else (name, one.version, one.backbone, one.run, one.since or "unknown", one.how, one.front)
        for name, one in found.items()
    ]
    if not rows:
        console.print("no router is registered here", highlight=False)
    elif console.is_terminal:
        table = Table(*head)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    else:
        for row in (head, *rows):
            print_cells(row, console)
