"""A router on disk answers as the one it was made of, and says what is wrong with a folder that is not one."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from flows.cli import app
from quee_core.backbones.registry import blank_backbone
from quee_core.cascades import SUMMED_CORRECTED, Cascade
from quee_core.costs import bitops_table
from quee_core.deployment import OperatingPoint, load_router, plain_rule, router_digest, save_router
from quee_core.errors import ConfigError, DamagedTableError, StoreError
from quee_core.gate_costs import gate_bitops
from quee_core.grid import assemble, fit_gate, grid_points
from quee_core.paths import Path as BitPath
from quee_core.policy import GatePolicy
from quee_core.revisions import fit_revisions
from quee_core.router import Router
from quee_core.shipping import GateRule
from tests.conftest import SmallSweep

PRICE = 0.05
CASCADE = Cascade(
    (BitPath((8,)), BitPath((8, 8))), "margin", (0.1 + 0.2,), SUMMED_CORRECTED
)  # a float that has no short decimal
PLAIN = Cascade((BitPath((2,)), BitPath((8, 8))), "margin", (0.3,))


@dataclass(frozen=True)
class Saved:
    folder: Path
    router: Router
    images: torch.Tensor


@pytest.fixture(scope="module")
def saved(small_sweep: SmallSweep, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    plan = small_sweep.plan
    point = grid_points(plan.config)[0]
    fits = [
        f for g in plan.tree.gates for f in fit_gate(g, [point], plan.tree, small_sweep.target, small_sweep.select, 0)
    ]
    policy = assemble(point, plan.tree, fits)
    assert isinstance(policy, GatePolicy), policy
    table = bitops_table(plan.loaded.backbone, small_sweep.exits.head_macs(), plan.tree.bits)
    table = table.with_gates(gate_bitops(policy, projection_macs=small_sweep.exits.projection_macs))
    revisions, _ = fit_revisions(
        (small_sweep.target, small_sweep.select), [path for path in plan.tree.paths if path.is_uniform],
        len(plan.dataset.description.classes), 0, projection_macs=small_sweep.exits.projection_macs,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("run") / "router"
    save_router(
        folder, run="small", seeds={"splits": 4}, cautions=(), dataset="fashion_mnist",
        backbone=plan.loaded.backbone, preprocessing=plan.preprocessing,
        class_names=plan.dataset.description.classes, calibration=small_sweep.calibration, exits=small_sweep.exits,
        policy=policy, table=table, full_cost=1e9, revisions=revisions,
        points=(
            OperatingPoint(rule=plain_rule(CASCADE), price=0.5, cost=0.3, accuracy=0.8, low=0.7, high=0.9, n=120,
                           chosen_cost=0.3, chosen_accuracy=0.8),
            OperatingPoint(
                rule=plain_rule(GateRule(PRICE)), price=PRICE, cost=0.7, accuracy=0.7, low=0.6, high=0.8, n=120,
                chosen_cost=0.7, chosen_accuracy=0.9,  # luck on the test images, good or bad, must choose nothing
            ),
        ),
    )  # fmt: skip
    images = next(plan.batches(plan.splits["test"])).images[:40]
    return Saved(folder, Router(small_sweep.network, policy, table, revisions), images)


def copied(saved: Saved, to: Path) -> Path:
    to.mkdir()
    for file in saved.folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_a_loaded_router_gives_the_bits_of_the_saved_one(saved: Saved) -> None:
    loaded = load_router(saved.folder)
    assert [point.as_rule() for point in loaded.manifest.points] == [CASCADE, GateRule(PRICE)]
    for rule in (GateRule(0.0), GateRule(PRICE), CASCADE, PLAIN):
        want, found = saved.router(saved.images, rule), loaded.router(saved.images, rule)
        np.testing.assert_array_equal(found.path, want.path)
        np.testing.assert_array_equal(found.probabilities, want.probabilities)
        np.testing.assert_array_equal(found.cost, want.cost)


def save_again(saved: Saved, small_sweep: SmallSweep, to: Path, points: slice = slice(None)) -> None:
    """What was loaded, with some of its operating points."""
    loaded = load_router(saved.folder)
    m = loaded.manifest
    save_router(
        to, run=m.run, seeds=m.seeds, cautions=m.cautions, dataset=m.dataset,
        backbone=small_sweep.plan.loaded.backbone,
        preprocessing=small_sweep.plan.preprocessing, class_names=m.class_names, calibration=small_sweep.calibration,
        exits=small_sweep.exits, policy=loaded.router.policy, table=m.costs, full_cost=m.full_cost,
        points=m.points[points], revisions=loaded.router.revisions,
    )  # fmt: skip


def test_saving_again_gives_equal_bytes(saved: Saved, small_sweep: SmallSweep, tmp_path: Path) -> None:
    save_again(saved, small_sweep, tmp_path)
    for file in saved.folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_revisions_that_no_rule_asks_for_are_not_saved(saved: Saved, small_sweep: SmallSweep, tmp_path: Path) -> None:
    save_again(saved, small_sweep, tmp_path, slice(1, None))
    assert not (tmp_path / "revisions.safetensors").exists()
    assert load_router(tmp_path).router.revisions is None


def test_a_budget_buys_the_dearest_point_within_it(saved: Saved) -> None:
    loaded = load_router(saved.folder)
    assert loaded.point_within(1.0).as_rule() == GateRule(PRICE)
    assert loaded.point_within(0.5).as_rule() == CASCADE
    with pytest.raises(ConfigError, match=r"budget 0\.1: the cheapest operating point costs 0\.300"):
        loaded.point_within(0.1)


def test_a_price_buys_the_point_of_least_loss(saved: Saved) -> None:
    loaded = load_router(saved.folder)
    assert loaded.point_at(0.0).as_rule() == GateRule(PRICE)
    assert loaded.point_at(0.2).as_rule() == GateRule(PRICE)  # 0.1 errors for 0.4 of the cost: worth it below 0.25
    assert loaded.point_at(0.3).as_rule() == CASCADE
    assert loaded.point_at(30.0).as_rule() == CASCADE


@pytest.mark.parametrize("name", ["backbone", "calibration", "exits", "policy", "revisions"])
def test_a_flipped_bit_is_found_and_named(saved: Saved, tmp_path: Path, name: str) -> None:
    folder = copied(saved, tmp_path / "copy")
    file = folder / f"{name}.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedTableError, match=f"{name}.safetensors: its checksum"):
        load_router(folder)
    assert router_digest(folder) is None  # so that the next sweep exports it anew
    assert router_digest(saved.folder) == router_digest(saved.folder) is not None


def test_what_is_no_router_is_refused(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no router here"):
        load_router(tmp_path)
    folder = copied(saved, tmp_path / "copy")
    manifest = json.loads((folder / "router.json").read_text())
    (folder / "router.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(StoreError, match="format 99"):
        load_router(folder)
    (folder / "router.json").write_text("{}")
    with pytest.raises(StoreError, match="not a router of this version"):
        load_router(folder)


@pytest.mark.parametrize(
    ("name", "size"),
    [("vit_tiny_patch16_224", (224, 224)), ("vit_tiny_patch16_224", (96, 96)), ("test_vit", (160, 160))],
)
def test_blank_architectures_have_the_size_asked_for(name: str, size: tuple[int, int]) -> None:
    blocks = {"vit_tiny_patch16_224": 12, "test_vit": 6}[name]
    backbone = blank_backbone(name, exits=(2, blocks), num_classes=7, image_size=size)
    assert backbone.image_shape == (3, *size)
    assert backbone.num_classes == 7
    assert backbone.exits == (2, blocks)
    assert not backbone.training


class TestRouteCommand:
    def files(self, folder: Path, count: int = 3) -> list[str]:
        pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        made = [folder / f"{k}.png" for k in range(count)]
        for image, file in zip(pixels, made, strict=True):
            Image.fromarray(image).save(file)
        return [str(file) for file in made]

    def test_answers_are_those_of_the_router(self, saved: Saved, tmp_path: Path) -> None:
        files = self.files(tmp_path)
        result = CliRunner().invoke(
            app, ["route", str(saved.folder), *files, "--price", "0.05", "--batch", "2", "--device", "cpu", "--json"]
        )
        assert result.exit_code == 0, result.output
        answers = json.loads(result.stdout)
        loaded = load_router(saved.folder)
        routed = loaded.router(torch.stack([loaded.preprocess(Image.open(file)) for file in files]), GateRule(PRICE))
        for k, answer in enumerate(answers):
            assert answer["file"] == files[k]
            assert answer["label"] == loaded.manifest.class_names[routed.label[k]]
            assert answer["path"] == routed.journeys[int(routed.path[k])]
            assert answer["cost"] == routed.cost[k]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--price", "nan"], "want finite prices"),
            (["--price", "-1"], "want finite prices"),
            (["--budget", "0.01"], "the cheapest operating point costs 0.300"),
            (["--price", "1", "--budget", "1"], "give one of the two"),
            (["--budget", "40"], "at most 1, such as 0.4"),
            (["missing.png"], "missing.png: cannot be read"),
        ],
    )
    def test_bad_requests(self, saved: Saved, tmp_path: Path, options: list[str], message: str) -> None:
        result = CliRunner().invoke(app, ["route", str(saved.folder), *self.files(tmp_path), *options])
        assert result.exit_code == 2
        assert message in result.output

    def test_a_file_that_is_no_image_is_named(self, saved: Saved, tmp_path: Path) -> None:
        (tmp_path / "bad.png").write_bytes(b"no image")
        result = CliRunner().invoke(app, ["route", str(saved.folder), str(tmp_path / "bad.png")])
        assert result.exit_code == 2
        assert "bad.png: image cannot be decoded" in result.output

    def test_a_run_without_a_router_is_refused(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(app, ["route", "nothing", *self.files(tmp_path), "--runs", str(tmp_path)])
        assert result.exit_code == 2
        assert "holds no router" in result.output
