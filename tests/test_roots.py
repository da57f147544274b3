"""No name out of a configuration, a folder of weights, a data set or a router leads out of the folder it belongs to."""

import json
import shutil
from pathlib import Path

import pytest

from flows.new_backbones import sweep_name
from quee_core.config import SweepConfig, parse_config
from quee_core.errors import ConfigError
from quee_core.paths import Path as BitPath
from quee_core.runs import ROUTER_MANIFEST, router_folder
from quee_core.tables import Cell
from tests.finished_run import FinishedRun, finished_run  # noqa: F401 (a fixture)
from tests.quee_command import refused

OUT = ("..", "../up", "a/../../up", "/etc", "a/b", "a\\b", "", ".", "-x", "a\nb", "a\0b")


@pytest.mark.parametrize("name", OUT)
def test_a_sweep_is_not_called_by_a_way_out_of_the_runs_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=r"name: "):
        parse_config({"name": name}, source="sweep.yaml")


@pytest.mark.parametrize("label", OUT)
def test_a_sweep_of_weights_with_such_a_name_is_called_by_another(label: str) -> None:
    name = sweep_name("quick", label)
    assert SweepConfig(name=name).name == name
    assert "/" not in name


@pytest.mark.parametrize("name", [name for name in OUT if name])
def test_a_table_of_such_a_backbone_or_data_set_lies_in_its_own_folder(name: str, tmp_path: Path) -> None:
    cell = Cell(name, name, name, BitPath((4,)), 0, 1, "0" * 40)
    place = (tmp_path / cell.location).resolve()
    assert place.is_relative_to(tmp_path)
    assert len(place.relative_to(tmp_path).parts) == 6


def test_a_router_with_a_file_outside_its_folder_is_refused(
    finished_run: FinishedRun,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = tmp_path / "runs" / "small"
    shutil.copytree(finished_run.folder, folder)
    path = router_folder(folder) / ROUTER_MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"]["../record.json"] = "0" * 64
    path.write_text(json.dumps(manifest))
    told = refused(tmp_path, "route", "small", "photo.png")
    assert "not a router of this version of quee: files.../record.json" in told
