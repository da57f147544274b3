"""What a plan says of each stage, and that the walk needs no more memory for more images."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from quee_core.config import SweepConfig
from quee_core.costs import bitops_table, path_costs
from quee_core.estimate import estimate
from quee_core.features import head_views
from quee_core.paths import Path as TreePath
from quee_core.plan import SweepPlan, outline, resolve
from quee_core.stage_estimates import StageEstimate, row_bytes, stage_estimates
from quee_core.stages import calibration_of, quantized_of
from quee_core.store import Store
from tests.conftest import small_config

STAGES = ["calibrate", "train heads", "extract", "assemble tables", "fit the grid", "evaluate"]


@pytest.fixture(autouse=True)
def quick_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TRIAL_ROWS", 60), ("TRIAL_WIDTH", 16), ("KEPT_ROWS", 64), ("KEPT_IMAGES", 2)):
        monkeypatch.setattr(f"quee_core.stage_estimates.{name}", value)
    monkeypatch.setattr("quee_core.estimate.TRIAL_PIXELS", 1)


def by_stage(plan: SweepPlan, lacking: list[tuple[int, list[TreePath]]]) -> dict[str, StageEstimate]:
    return {stage.stage: stage for stage in stage_estimates(plan, lacking, 0.001)}


def test_a_walk_costs_what_its_paths_cost_and_its_shared_beginnings_only_once(tmp_path: Path) -> None:
    plan = resolve(small_config(tmp_path))
    heads, backbone = plan.config.heads, plan.loaded.backbone
    macs = heads.statistics * backbone.embed_dim * 10 + heads.hidden * (heads.statistics * backbone.embed_dim + 10)
    own: list[int | None] = [macs] * (plan.tree.depth - 1)
    table = bitops_table(backbone, [*own, None], plan.tree.bits, edge=plan.edge_bits, stem=plan.stem_bits)
    for path in (plan.tree.full_path, plan.tree.paths[0]):
        alone = by_stage(plan, [(7, [path])])["extract"]
        assert alone.passes == 7 * path.exit
        assert alone.bitops == pytest.approx(7 * path_costs(table, [path], evaluated="final")[0])
        assert alone.kept == 7 * row_bytes(plan)
        assert alone.seconds == pytest.approx(0.001 * alone.passes)
    full = list(plan.tree.full_path.prefixes())[1:]
    together = by_stage(plan, [(7, full)])["extract"]
    assert together.bitops == pytest.approx(7 * path_costs(table, [plan.tree.full_path], evaluated="every")[0])
    twice = by_stage(plan, [(7, full), (7, full), (5, [])])["extract"]
    assert (twice.passes, twice.bitops, twice.kept) == (2 * together.passes, 2 * together.bitops, 2 * together.kept)


def test_heads_need_meanwhile_what_their_views_take_on_disk(tmp_path: Path) -> None:
    plan, store = resolve(small_config(tmp_path)), Store.open(str(tmp_path / "store"))
    calibration, _ = calibration_of(plan, store, torch.device("cpu"))
    quantized = quantized_of(plan, calibration, torch.device("cpu"))
    heads, images = plan.config.heads, sum(len(s.positions) for s in plan.head_images())
    (tmp_path / "scratch").mkdir()
    views = head_views(
        quantized, plan.batches(plan.head_images()), plan.head_bits, images=images, copies=heads.copies,
        mirror=heads.mirror, seed=heads.seed, scratch=tmp_path / "scratch",
    )  # fmt: skip
    told = by_stage(plan, [])["train heads"]
    assert told.scratch == sum(pooled.numel() * 4 for pooled in views.pooled)
    assert told.passes == images * len(views.shown) * plan.tree.depth


def test_a_plan_of_all_of_imagenet_says_what_each_stage_takes(tmp_path: Path) -> None:
    sweep = SweepConfig.model_validate(
        {
            "dataset": {"name": "imagenet", "root": tmp_path / "data", "fit": 0.4, "target": 0.45, "select": 0.15},
            "backbone": {"name": "t2t_vit_14", "checkpoint": "t2t.pth.tar", "exits": list(range(1, 15))},
            "paths": {"bits": [4, 6, 8], "policy": "sampled", "sampled_paths": 48},
            "run": {"store": str(tmp_path / "store"), "runs": tmp_path / "runs"},
        }
    )
    plan, missing = outline(sweep)
    found = estimate(plan, Store.open(str(tmp_path / "store")), torch.device("cpu"), missing)
    assert sum(found.images.values()) == 1_281_167 + 50_000
    assert [stage.stage for stage in found.stages] == STAGES
    assert all(stage.seconds > 0 and np.isfinite(stage.seconds) for stage in found.stages)
    calibrate, heads, extract, assemble, *_ = found.stages
    assert all(stage.bitops > 0 and stage.passes > 0 and stage.kept > 0 for stage in (calibrate, heads, extract))
    assert heads.scratch > 10e9
    assert extract.kept == assemble.kept == found.paths * 50_000 * row_bytes(plan)
    assert json.loads(json.dumps(found.as_dict()))["stages"][2]["passes"] == found.edges_per_image * 50_000
    assert len(found.missing) == 2


_WALK = """
import resource, sys, torch
from quee_core.config import SweepConfig
from quee_core.plan import resolve
from quee_core.stages import branches_of, cells_of, extract_branch, network_of
from quee_core.store import Store

plan = resolve(SweepConfig.model_validate_json(sys.argv[1]))
store = Store.open(plan.config.run.store)
network, exits, calibration = network_of(plan, store, torch.device("cpu"))
for split, shard, bits in branches_of(plan):
    cells = cells_of(plan, exits, calibration, split, shard, plan.tree.branch(bits))
    extract_branch(plan, store, network, cells, split, shard)
print(sum(plan.images[split] for split in plan.walked), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_walk_over_more_images_needs_no_more_memory(tmp_path: Path) -> None:
    most = []
    for limit in (300, 2400):
        sweep = small_config(
            tmp_path / str(limit), dataset={"limit": limit}, heads={"images": 100, "epochs": 1},
            run={"batch": 50, "shard_images": 100},
        )  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", _WALK, sweep.model_dump_json()], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        most.append([int(word) for word in done.stdout.split()])
    (few, little), (many, much) = most
    assert many > 6 * few
    assert much < little + 20 * 1024  # kB: the tables of all would be four times that
