"""The walk and its tables: prefixes are shared, batches do not show, and a rerun computes nothing."""

import numpy as np
import torch

from quee_core.features import walk, walked_edges
from quee_core.paths import Path
from quee_core.stages import branches_of, cells_of, extract_branch
from quee_core.tables import Outcomes
from tests.conftest import SmallSweep


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
    alone = Outcomes.from_tables(list(walk(small_sweep.network, few, plan.tree.paths)))
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


def test_a_rerun_computes_no_cell_and_a_lost_one_alone(small_sweep: SmallSweep) -> None:
    plan, store = small_sweep.plan, small_sweep.store
    for split, shard, bits in branches_of(plan):
        cells = cells_of(plan, small_sweep.exits, small_sweep.calibration, split, shard, plan.tree.branch(bits))
        assert extract_branch(plan, store, small_sweep.network, cells, split, shard).computed == 0


def test_only_edges_that_lead_to_wanted_cells_are_walked() -> None:
    assert walked_edges([Path((8, 8, 4))]) == 3
    assert walked_edges([Path((8, 8, 4)), Path((8, 4)), Path((8,))]) == 4
    assert walked_edges([]) == 0


def test_cells_of_other_bit_widths_keep_their_keys(small_sweep: SmallSweep) -> None:
    plan = small_sweep.plan
    path = Path((8, 8))
    cells = cells_of(plan, small_sweep.exits, small_sweep.calibration, "test", 0, [path])
    assert str(cells[path].path) == "-".join(["8"] * 8)
    other = cells_of(plan, small_sweep.exits, small_sweep.calibration, "select", 0, [path])
    assert cells[path].key != other[path].key
