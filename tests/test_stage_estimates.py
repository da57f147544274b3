"""What a plan says of each stage, and that the walk needs no more memory for more images."""

import json
from collections import Counter
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
from quee_core.quantize.calibration import QuantizedBackbone
from quee_core.stage_estimates import Pace, StageEstimate, row_bytes, stage_estimates
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
    return {stage.stage: stage for stage in stage_estimates(plan, lacking, Pace(0.001, 0.0), torch.device("cpu"))}


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


def test_heads_cost_and_need_what_their_views_do(tmp_path: Path) -> None:
    # one batch, so that a segment that is called is a view
    sections = {"paths": {"bits": [2, 8, 32]}, "heads": {"copies": 2}, "run": {"batch": 200}}
    plan, store = resolve(small_config(tmp_path, **sections)), Store.open(str(tmp_path / "store"))
    calibration, _ = calibration_of(plan, store, torch.device("cpu"))
    quantized, ran = quantized_of(plan, calibration, torch.device("cpu")), Counter[tuple[int, int]]()
    heads, images = plan.config.heads, sum(len(s.positions) for s in plan.head_images())
    (tmp_path / "scratch").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        of = QuantizedBackbone.segments

        def counted(self: QuantizedBackbone, index: int, bits: int) -> torch.nn.Module:
            ran[index, bits] += 1
            return of(self, index, bits)

        patch.setattr(QuantizedBackbone, "segments", counted)
        views = head_views(
            quantized, plan.batches(plan.head_images()), plan.head_bits, images=images, copies=heads.copies,
            mirror=heads.mirror, seed=heads.seed, scratch=tmp_path / "scratch",
        )  # fmt: skip
    told = by_stage(plan, [])["train heads"]
    assert told.scratch == sum(file.stat().st_size for file in (tmp_path / "scratch").iterdir())
    assert told.passes == images * len(views.shown) * plan.tree.depth == images * sum(ran.values())
    segments = bitops_table(plan.loaded.backbone, [1, None], [2, 8, 32]).segments
    run = images * sum(count * segments[bits][index] for (index, bits), count in ran.items())
    drawn = images * heads.copies * (sum(segments[8]) - sum(segments[2]))  # which of them mixed paths are made of
    assert run - drawn < told.bitops < run + drawn + images * 3 * 1e8  # stems and the own head


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
