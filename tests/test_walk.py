"""The walk and its tables: prefixes are shared, batches do not show, and a rerun computes nothing."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch

from quee_core.data.splits import SplitName
from quee_core.errors import NumericError
from quee_core.features import walk, walked_edges
from quee_core.paths import Path
from quee_core.plan import resolve
from quee_core.stages import Work, branches_of, cells_of, extract_branch, network_of
from quee_core.store import Store
from quee_core.tables import Cell, Outcomes
from tests.conftest import SmallSweep, small_config


def test_splits_of_a_sweep_share_no_image(small_sweep: SmallSweep) -> None:
    ids = [set(small_sweep.plan.sample_ids(split).tolist()) for split in ("fit", "target", "select", "test")]
    assert sum(map(len, ids)) == len(set.union(*ids))


def test_tables_say_what_running_each_path_by_itself_says(small_sweep: SmallSweep) -> None:
    plan, network = small_sweep.plan, small_sweep.network
    batch = next(plan.batches(plan.splits["test"]))
    for path in plan.tree.paths:
        tokens = network.stem(batch.images)
        for index, bits in enumerate(path.bits):
            tokens = network.run(index, bits, tokens)
        answer = network.answer(path.exit, tokens)
        column = plan.tree.index[path]
        np.testing.assert_array_equal(answer.logits.argmax(1), small_sweep.test.predicted[: len(batch.labels), column])


def test_the_walk_of_all_at_once_equals_the_walk_of_each_image_alone(small_sweep: SmallSweep) -> None:
    plan = small_sweep.plan
    batch = next(plan.batches(plan.splits["select"]))
    few = [type(batch)(batch.images[k : k + 1], batch.labels[k : k + 1], batch.sample_ids[k : k + 1]) for k in range(5)]
    alone = Outcomes.from_tables(list(walk(small_sweep.network, few, plan.tree.paths, images=5)))
    together = small_sweep.select.take(np.arange(5))
    for name in ("predicted", "uncertainty", "top_p", "embedding"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(together, name), err_msg=name)


def test_segments_at_32_bits_are_the_backbone_itself(small_sweep: SmallSweep) -> None:
    quantized = small_sweep.network.quantized
    images = next(small_sweep.plan.batches(small_sweep.plan.splits["test"])).images
    with torch.inference_mode():
        tokens = quantized.backbone.stem(images)
        for index in range(quantized.backbone.depth):
            tokens = quantized.segments(index, 32)(tokens)
        assert torch.equal(quantized.backbone.output(tokens), quantized.backbone(images))


def test_a_rerun_computes_no_cell_and_a_lost_one_alone(small_sweep: SmallSweep, tmp_path: FilePath) -> None:
    plan, network = small_sweep.plan, small_sweep.network
    shutil.copytree(plan.config.run.store, tmp_path / "store")
    store = Store.open(str(tmp_path / "store"))
    lost: Path | None = None
    for split, shard, bits in branches_of(plan):
        cells = cells_of(plan, small_sweep.exits, small_sweep.calibration, split, shard, plan.tree.branch(bits))
        assert extract_branch(plan, store, network, cells, split, shard) == Work(0, len(cells))
        if lost is None:
            lost, cell = next(iter(cells.items()))
            before = store.get_table(cell)
            for file in (tmp_path / "store" / cell.folder).rglob("*"):
                file.unlink()
            assert extract_branch(plan, store, network, cells, split, shard) == Work(1, len(cells) - 1)
            assert store.get_table(cell).equals(before)


def test_only_edges_that_lead_to_wanted_cells_are_walked() -> None:
    assert walked_edges([Path((8, 8, 4))]) == 3
    assert walked_edges([Path((8, 8, 4)), Path((8, 4)), Path((8,))]) == 4
    assert walked_edges([]) == 0


def test_another_bit_width_or_exit_leaves_the_cells_that_are_there(tmp_path: FilePath) -> None:
    run = {"store": str(tmp_path / "store"), "runs": str(tmp_path / "runs"), "device": "cpu"}

    def cells(bits: list[int], exits: list[int], split: SplitName = "test") -> dict[str, Cell]:
        config = small_config(
            tmp_path, paths={"bits": bits}, backbone={"exits": exits}, heads={"bits": [2, 8], "epochs": 1}, run=run
        )
        plan, store = resolve(config), Store.open(run["store"])
        _, exits_fitted, calibration = network_of(plan, store, torch.device("cpu"))
        found = cells_of(plan, exits_fitted, calibration, split, 0, plan.tree.paths)
        return {str(cell.path): cell for cell in found.values()}

    before = cells([2, 8], [4, 8])
    assert str(before["-".join(["8"] * 8)].path) == "8-8-8-8-8-8-8-8"
    for after in (cells([2, 4, 8], [4, 8]), cells([2, 8], [4, 6, 8])):
        assert len(after) > len(before)
        assert before.items() <= after.items()
    assert not {c.key for c in before.values()} & {c.key for c in cells([2, 8], [4, 8], "select").values()}


def test_memory_of_a_walk_does_not_grow_with_its_batches(small_sweep: SmallSweep) -> None:
    """The peaks of one process, few batches first, twice: what its heap has got then serves whatever needs no more."""
    code = (
        "import pathlib, re, sys, torch\n"
        "from quee_core.config import SweepConfig\n"
        "from quee_core.features import walk\n"
        "from quee_core.plan import resolve\n"
        "from quee_core.stages import network_of\n"
        "from quee_core.store import Store\n"
        "plan = resolve(SweepConfig.model_validate_json(sys.argv[1]))\n"
        "network = network_of(plan, Store.open(plan.config.run.store), torch.device('cpu'))[0]\n"
        "batch = next(plan.batches(plan.splits['test']))\n"
        "for times in (12, 12, 60):\n"
        "    list(walk(network, [batch] * times, plan.tree.paths, images=times * len(batch.labels)))\n"
        "    print(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, small_sweep.plan.config.model_dump_json()],
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},  # else each thread has a heap, as many as happen to overlap
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    _, few, many = map(int, told.stdout.split())
    activation = 120 * 50 * 128 * 4 / 1024  # KiB, of a batch's tokens, at one exit
    assert many - few < 48 * activation / 2  # 48 batches more, of which none is kept; a heap breaks into pieces


def test_a_walk_that_fails_leaves_no_decoding_thread_though_its_error_is_kept(small_sweep: SmallSweep) -> None:
    plan = small_sweep.plan
    cells = cells_of(plan, small_sweep.exits, small_sweep.calibration, "test", 0, plan.tree.paths)

    def stop(_images: int) -> None:
        raise NumericError("enough")

    before = set(threading.enumerate())
    with pytest.raises(NumericError, match="enough") as kept:
        extract_branch(plan, Store.open("memory://stopped"), small_sweep.network, cells, "test", 0, on_images=stop)
    assert kept.value.__traceback__ is not None
    assert set(threading.enumerate()) <= before
