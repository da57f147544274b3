"""What another version of quee wrote is refused by name, with what to do, and never read as if it were ours."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quee_core.runs import RECORD, ROUTER, ROUTER_MANIFEST
from tests.finished_run import FinishedRun, finished_run  # noqa: F401 (a fixture)
from tests.quee_command import quee, refused, write_sweep


@pytest.fixture
def run(finished_run: FinishedRun, tmp_path: Path) -> Path:  # noqa: F811
    """A folder with a finished run of this version, `runs/small`, which every command takes."""
    shutil.copytree(finished_run.folder, tmp_path / "runs" / "small")
    done = quee(tmp_path, "compare", "small")
    assert done.exit_code == 0, done.output
    return tmp_path


def rewrite(path: Path, **changed: Any) -> None:
    """Put other values into a JSON file; None takes a field out."""
    stated = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({name: value for name, value in stated.items() if value is not None}))


def test_a_setting_of_an_earlier_version_is_named_with_what_replaced_it(tmp_path: Path) -> None:
    write_sweep(tmp_path, run={"shards": 4})
    for command in ("plan", "sweep"):
        told = refused(tmp_path, command, "sweep.yaml")
        assert "run.shards: a setting of an earlier version of quee; say run.shard_images instead, how many" in told


@pytest.mark.parametrize(
    ("changed", "why"),
    [({"budgets": None}, "budgets: Field required"), ({"speed": 3}, "speed: Extra inputs are not permitted")],
)
def test_a_record_of_another_version_is_refused_by_every_command_that_reads_it(
    run: Path, changed: dict[str, Any], why: str
) -> None:
    rewrite(run / "runs" / "small" / RECORD, **changed)
    for command in ("report", "compare"):
        told = refused(run, command, "small")
        assert told == (
            f"runs/small/{RECORD}: not a record of this version of quee: {why}; run its sweep again to write it anew"
        )


def test_a_record_with_settings_of_an_earlier_version_is_not_compared(run: Path) -> None:
    record = run / "runs" / "small" / RECORD
    config = json.loads(record.read_text())["config"]
    rewrite(record, config={**config, "run": {**config["run"], "shards": 1}})
    told = refused(run, "compare", "small")
    assert told.startswith("runs/small: settings in its record: run.shards: a setting of an earlier version")


@pytest.mark.parametrize("command", ["route", "compare"])
def test_a_router_of_an_earlier_format_is_told_by_its_number(run: Path, command: str) -> None:
    """Its costs were a mapping then, and its unit a field of its own: the format is what is told, not these."""
    rewrite(run / "runs" / "small" / ROUTER / ROUTER_MANIFEST, format=1, costs={"8": 1.0}, cost_unit="bitops")
    told = refused(run, command, "small", *(["photo.png"] if command == "route" else []))
    assert told.startswith(f"runs/small/{ROUTER}/{ROUTER_MANIFEST}: format 1, this version of quee reads ")
    assert told.endswith("; run the sweep again to write it")


def test_a_router_that_another_version_wrote_in_the_same_format_is_told_by_its_field(run: Path) -> None:
    rewrite(run / "runs" / "small" / ROUTER / ROUTER_MANIFEST, preprocessing=None)
    told = refused(run, "route", "small", "photo.png")
    assert told.endswith(
        "not a router of this version of quee: preprocessing: Field required; run the sweep again to write it"
    )
