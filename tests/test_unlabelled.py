"""Unlabelled images, from the file to the front: they run along every path, and labels are never asked of them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quee_core.comparison import run_outcomes
from quee_core.data.datasets import load_dataset
from quee_core.deployment import load_router
from quee_core.runs import router_folder
from quee_core.tables import Outcomes
from tests.quee_command import computed, finished, quee, write_sweep

pytestmark = [
    pytest.mark.usefixtures("prefect_home"),
    pytest.mark.xdist_group("bad input"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of MLflow's
]


def write_set(folder: Path, counts: dict[str, int]) -> None:
    """Fashion-MNIST images as a Parquet set; those of `unlabelled` without labels."""
    bundled = load_dataset("fashion_mnist")
    source = {"train": "train", "val": "heldout", "unlabelled": "heldout", "test": "test"}
    start = dict.fromkeys(source.values(), 0)
    for part, count in counts.items():
        rows = range(start[source[part]], start[source[part]] + count)
        start[source[part]] += count
        columns = {
            "sample_id": bundled.sample_ids(source[part])[rows],
            "label": bundled.labels(source[part])[rows],
            "image": [bundled.content(source[part], row) for row in rows],
        }
        if part == "unlabelled":
            del columns["label"]
        named = {"classes": '["' + '", "'.join(bundled.description.classes) + '"]'}
        pq.write_table(pa.table(columns).replace_schema_metadata(named), folder / f"{part}.parquet")


def cheapest_accuracy(folder: Path) -> float:
    """What the cheapest rule showed where it was chosen."""
    return load_router(router_folder(folder / "runs" / "small")).manifest.points[0].chosen_accuracy


def test_a_sweep_chooses_its_rules_on_unlabelled_images_too(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    write_set(images, {"train": 200, "val": 120, "unlabelled": 90, "test": 80})
    dataset = {"name": "parquet", "root": str(images), "trained_on": "train", "limit": None, "unlabelled": 1000}
    write_sweep(tmp_path, dataset=dataset)
    planned = quee(tmp_path, "plan", "sweep.yaml")
    assert "unlabelled 90" in planned.output
    record = finished(tmp_path)
    assert record.splits["unlabelled"] == 90
    assert computed(record, "extract") == 24  # of the four splits, six paths each
    [folder] = (tmp_path / "runs" / "small" / "outcomes").glob("unlabelled-*")
    unlabelled = Outcomes.load(folder)
    assert set(unlabelled.labels.tolist()) == {-1}
    tuned = {int(i) for part in run_outcomes(tmp_path / "runs" / "small") for i in part.sample_ids}
    assert not tuned & set(unlabelled.sample_ids.tolist())
    helped = cheapest_accuracy(tmp_path)
    again = finished(tmp_path)
    assert computed(again, "extract") == 0
    assert again.fronts == record.fronts

    write_sweep(tmp_path, dataset=dataset | {"unlabelled": 0})
    without = finished(tmp_path)
    assert "unlabelled" not in without.splits
    assert computed(without, "extract") == 0  # the other splits are as they were
    fronts, others = ({front.method: front for front in of.fronts} for of in (record, without))
    assert fronts["threshold"].points == others["threshold"].points
    assert cheapest_accuracy(tmp_path) != helped  # it is judged on fewer images now
    assert any("90 unlabelled images" in caution for caution in record.cautions)
