"""Sweep records for tests: simulated images of varying difficulty, whose figures have the shape of a real sweep's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quee_core.fronts import (
    Decisions,
    at_budgets,
    choose_points,
    correctness,
    cost_at_drop,
    hypervolume_per_image,
    operating_points,
    paired_bootstrap,
    wilson_interval,
)
from quee_core.paths import ROOT, PathTree
from quee_core.predictors.quality import brier, expected_calibration_error, reliability_bins, rmse
from quee_core.record import (
    BaselineNeeds,
    BudgetRow,
    CalibrationRecord,
    DropRow,
    FrontPoint,
    FrontRecord,
    GridRow,
    MethodKind,
    SegmentCost,
    ShareRow,
    StageTiming,
    SweepRecord,
    UniformAccuracy,
)

FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
BUDGETS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8)


@dataclass(frozen=True, eq=False)
class World:
    """n images through every path of a tree. error_rate: float64 [n, P]; errors: bool [n, P]; costs: float64 [P]."""

    tree: PathTree
    labels: NDArray[np.intp]
    error_rate: NDArray[np.float64]
    errors: NDArray[np.bool_]
    costs: NDArray[np.float64]
    rng: np.random.Generator


def simulate(tree: PathTree, classes: int, images: int, seed: int) -> World:
    """Images whose difficulty differs by class, and paths whose strength grows with depth and bit-width."""
    rng = np.random.default_rng(seed)
    quality = {b: 1 - 0.75 * 2.0 ** -(b - 2 + 0.5) for b in tree.bits}
    strength = np.array(
        [3.6 * (np.mean([quality[b] for b in p.bits]) ** 1.6) * (p.exit / tree.depth) ** 0.45 for p in tree.paths]
    )
    labels = rng.permutation(np.arange(images) % classes)
    difficulty = rng.normal(0, 1.3, classes)[labels] + rng.normal(0, 1.2, images)
    error_rate = 1 / (1 + np.exp(1.7 * (strength[None] - difficulty[:, None] - 0.6)))
    luck = 0.6 * rng.random((images, 1)) + 0.4 * rng.random((images, len(tree.paths)))
    widest = max(tree.bits)
    segment = [np.sum(np.square(p.bits)) / (widest**2 * tree.depth) for p in tree.paths]
    costs = 0.03 + 0.95 * np.array(segment) + 0.005 * np.array([p.exit for p in tree.paths])
    return World(tree, labels, error_rate, luck < error_rate, costs / costs.max(), rng)


def realistic_record() -> SweepRecord:
    """34 monotone paths of 2, 4 and 8 bits over 4 exits, 10 classes, 5 methods: the shape of the default sweep."""
    return build_record(simulate(PathTree.of((2, 4, 8), 4, "monotone"), 10, 4000, seed=3), FASHION)


def thousand_class_record() -> SweepRecord:
    """1000 classes of few images each."""
    names = tuple(f"class {k:04d}, a rather long name as ImageNet has them" for k in range(1000))
    return build_record(simulate(PathTree.of((4, 8), 4, "monotone"), 1000, 4000, seed=4), names)


def many_exit_record() -> SweepRecord:
    """12 exits and four bit-widths, sampled: more paths, gates and pieces than any figure can label."""
    tree = PathTree.of((2, 3, 4, 8), 12, "sampled", sampled_paths=30, seed=0)
    return build_record(simulate(tree, 10, 1500, seed=5), FASHION)


def losing_record() -> SweepRecord:
    """QuEE's estimates are worthless here: the report must say so as plainly as it would a success."""
    return build_record(simulate(PathTree.of((2, 4, 8), 4, "monotone"), 10, 3000, seed=6), FASHION, noise=4.0)


def sparse_record() -> SweepRecord:
    """One exit, one bit-width, one point: nothing to compare with, and every optional value is None."""
    interval = {"accuracy": 0.9, "low": 0.8, "high": 0.95, "n": 50}
    point = FrontPoint(setting="λ = 0", price=0.0, cost=1.0, chosen=True, **interval)
    front = FrontRecord(
        method="quee", kind="quee", points=(point,), hypervolume=0.9, hypervolume_low=0.8, hypervolume_high=0.95,
        hypervolume_gain=None, hypervolume_gain_low=None, hypervolume_gain_high=None,
    )  # fmt: skip
    static = front.model_copy(update={"method": "static", "kind": "baseline"})
    return SweepRecord(
        name="sparse", created="2026-11-24T09:00:00Z", code_version="0" * 64, dataset="folder", backbone="vit_tiny",
        device="cpu", cost_unit="milliseconds", full_cost=1.25, cheapest_cost=1.0, class_names=("cat",), exits=(12,),
        bits=(32,), paths=1, splits={"fit": 50, "target": 50, "select": 50, "test": 50}, cautions=(),
        fronts=(front, static), budgets=(), drops=(DropRow(drop=0.0, method="quee", cost=None),),
        shares=(ShareRow(price=0.0, cost=1.0, class_name="all", n=50, shares={"32": 1.0}),),
        calibration=(), segment_costs=(SegmentCost(piece="stem", bits=32, macs=0, bitops=0, milliseconds=0.0),),
        uniform_accuracies=(UniformAccuracy(bits=32, exit=1, cost=1.0, **interval),),
        grid=(
            GridRow(point={"predictor": "mlp"}, rmse=None, brier=None, ece=None, hypervolume=None, seconds=0.0,
                    winner=False, failure="more clusters than images: 100 for 50"),
        ),
        timings=(), config={}, versions={}, seeds={}, fingerprints={},
    )  # fmt: skip


def hostile_record() -> SweepRecord:
    """Names that are HTML, or format strings: all of them must be shown as they are, and none obeyed."""
    name = "<img src=x onerror=alert(1)> & %{x} </script>"
    record = build_record(
        simulate(PathTree.of((4, 8), 2, "monotone"), 2, 400, seed=7), (name, '"><b>quoted</b> {{ 7 * 7 }}')
    )
    fronts = tuple(f.model_copy(update={"method": name}) if f.method == "random" else f for f in record.fronts)
    return record.model_copy(
        update={"dataset": name, "fronts": fronts, "cautions": (name,), "config": {"name": name}, "name": name}
    )


def build_record(world: World, class_names: Sequence[str], *, noise: float = 0.1) -> SweepRecord:
    """The record of QuEE, whose estimates of log odds are off by `noise`, and of four rivals in `world`."""
    tree, n = world.tree, len(world.labels)
    prices = np.concatenate([[0.0], np.geomspace(1e-3, 30, 50)])
    fronts = {d.method: _measure(d, world) for d in _methods(world, prices, noise)}
    low = float(world.costs.min())
    volumes = {m: hypervolume_per_image(f.cost, f.correct, low) for m, f in fronts.items()}
    full = float((~world.errors[:, -1]).mean())
    piece_bits = [("stem", 8)]
    piece_bits += [(f"segment {k}", b) for k in range(1, tree.depth + 1) for b in tree.bits]
    piece_bits += [(f"head {k}", 8) for k in range(1, tree.depth + 1)] + [(f"gate {k}", 32) for k in range(tree.depth)]
    return SweepRecord(
        name="quick", created="2026-11-24T09:12:45Z", code_version="9f2c61d07ab34e55" * 4, dataset="fashion_mnist",
        backbone="micro_vit_fashion_mnist", device="cpu (2 cores)", cost_unit="bitops", full_cost=3.34e9,
        cheapest_cost=low, class_names=tuple(class_names), exits=tuple(range(2, 2 * tree.depth + 1, 2)),
        bits=tree.bits, paths=len(tree.paths), splits={"fit": 4000, "target": 4500, "select": 1500, "test": n},
        cautions=(
            "The predictor was chosen among 7 grid points on 1,500 images of select; its intervals do not count that.",
            "2 bits, exit 1: accuracy is below 40 %, so the cheapest paths are rarely worth taking.",
        ),
        fronts=tuple(_front_record(m, f, volumes) for m, f in fronts.items()),
        budgets=_budgets(fronts),
        baselines=tuple(
            BaselineNeeds(method=m, labels=6000, trainings=3 * k, trained="a thing <for> each λ", seconds=0.5 + k)
            for k, m in enumerate(m for m, f in fronts.items() if f.decisions.kind == "baseline")
        ),
        drops=tuple(
            DropRow(drop=d, method=m, cost=cost_at_drop(f.cost, f.correct.mean(axis=1), full, d))
            for d in (0.0, 0.005, 0.01, 0.02) for m, f in fronts.items() if f.decisions.kind != "bound"
        ),
        shares=_shares(fronts["quee"], world, class_names), calibration=_calibration(world),
        segment_costs=tuple(_segment_cost(piece, bits, tree.depth) for piece, bits in piece_bits),
        uniform_accuracies=tuple(
            UniformAccuracy(bits=p.bits[0], exit=p.exit, cost=world.costs[k], **_accuracy(~world.errors[:, k]))
            for k, p in enumerate(tree.paths) if p.is_uniform
        ),
        grid=_grid(), timings=(
            StageTiming(stage="calibrate", seconds=21.4, images_per_second=None, computed=3, reused=0),
            StageTiming(stage="heads", seconds=48.0, images_per_second=702.5, computed=1, reused=0),
            StageTiming(stage="walk", seconds=163.2, images_per_second=122.5, computed=102, reused=34),
            StageTiming(stage="grid", seconds=91.7, images_per_second=None, computed=7, reused=0),
        ),
        config={"name": "quick", "dataset": {"name": "fashion_mnist", "limit": None}, "paths": {"bits": [2, 4, 8]},
                "predictors": [{"name": "mlp", "options": {"hidden": 64}}, {"name": "logistic", "options": {}}]},
        versions={"python": "3.11.2", "torch": "2.14.1", "timm": "1.0.31", "numpy": "2.4.6", "quee": "0.1.0"},
        seeds={"splits": 0, "paths": 0, "heads": 0, "sweep": 0, "bootstrap": 0},
        fingerprints={"backbone": "51b9" * 16, "images": "c07e" * 16, "calibration 8 bits": "aa41" * 16},
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Measured:
    decisions: Decisions
    cost: NDArray[np.float64]
    correct: NDArray[np.bool_]


def _methods(world: World, prices: NDArray[np.float64], noise: float) -> list[Decisions]:
    tree, rng, n = world.tree, world.rng, len(world.labels)
    odds = np.log(world.error_rate / (1 - world.error_rate))
    confidence = 1 - 1 / (1 + np.exp(-(odds + rng.normal(0, 0.7, odds.shape))))
    estimate = 1 / (1 + np.exp(-(odds + rng.normal(0, noise, odds.shape))))
    lambdas = tuple(f"λ = {p:.4g}" for p in prices)
    ladders = {b: [k for k, p in enumerate(tree.paths) if set(p.bits) == {b}] for b in tree.bits}

    def priced(method: str, kind: MethodKind, loss: NDArray[np.floating]) -> Decisions:
        choice = np.stack([np.argmin(loss + p * world.costs, axis=1) for p in prices]).astype(np.int16)
        return Decisions(method, kind, lambdas, tuple(prices.tolist()), choice)

    def laddered(
        method: str, label: str, exits: Callable[[NDArray[np.float64], float], NDArray[np.bool_]]
    ) -> Decisions:
        settings, choices = [], []
        for bits, ladder in ladders.items():
            for level in np.linspace(0.05, 0.999, 12):
                leave = exits(confidence[:, ladder], level)
                leave[:, -1] = True
                choices.append(np.array(ladder, np.int16)[leave.argmax(axis=1)])
                settings.append(f"{label}, {bits} bits, level {level:.2f}")
        return Decisions(method, "baseline", tuple(settings), (None,) * len(settings), np.stack(choices))

    static = np.repeat(np.arange(len(tree.paths), dtype=np.int16)[:, None], n, axis=1)
    return [
        priced("quee", "quee", estimate),
        Decisions("static", "baseline", tuple(map(str, tree.paths)), (None,) * len(tree.paths), static),
        laddered("threshold", "p_max", lambda sure, level: sure > level),
        laddered("random", "random", lambda sure, level: rng.random(sure.shape) > level),
        priced("oracle", "bound", world.errors.astype(float)),
    ]


def _measure(decisions: Decisions, world: World) -> _Measured:
    cost, accuracy = operating_points(decisions, world.errors, world.costs)
    chosen = choose_points(cost, accuracy)
    picked = decisions.take(chosen)
    return _Measured(picked, cost[chosen], correctness(picked, world.errors))


def _accuracy(correct: NDArray[np.bool_]) -> dict[str, float]:
    low, high = wilson_interval(int(correct.sum()), len(correct))
    return {"accuracy": float(correct.mean()), "low": low, "high": high, "n": len(correct)}


def _front_record(method: str, front: _Measured, volumes: dict[str, NDArray[np.float64]]) -> FrontRecord:
    means, lows, highs = paired_bootstrap(
        np.stack([volumes[method], volumes["quee"] - volumes[method]]), resamples=200, seed=0
    )
    gain = (None, None, None) if method == "quee" else (means[1], lows[1], highs[1])
    points = tuple(
        FrontPoint(
            setting=front.decisions.settings[k], price=front.decisions.prices[k], cost=front.cost[k], chosen=True,
            **_accuracy(front.correct[k]),
        )
        for k in range(len(front.cost))
    )  # fmt: skip
    return FrontRecord(
        method=method, kind=front.decisions.kind, points=points, hypervolume=means[0], hypervolume_low=lows[0],
        hypervolume_high=highs[0], hypervolume_gain=gain[0], hypervolume_gain_low=gain[1],
        hypervolume_gain_high=gain[2],
    )  # fmt: skip


def _budgets(fronts: dict[str, _Measured]) -> tuple[BudgetRow, ...]:
    values = {m: at_budgets(f.cost, f.correct, np.array(BUDGETS)) for m, f in fronts.items()}
    rows = []
    for k, budget in enumerate(BUDGETS):
        own = values["quee"][k]
        rivals = {
            m: v[k] for m, v in values.items() if fronts[m].decisions.kind == "baseline" and not np.isnan(v[k]).any()
        }
        if np.isnan(own).any() or not rivals:
            continue
        best = max(rivals, key=lambda m: rivals[m].mean())
        stack = np.stack([own, rivals[best], own - rivals[best]])
        mean, low, high = paired_bootstrap(stack, resamples=200, seed=0)
        rows.append(
            BudgetRow(
                budget=budget, accuracy=mean[0], low=low[0], high=high[0], n=len(own), baseline=best,
                baseline_accuracy=mean[1], difference=mean[2], difference_low=low[2], difference_high=high[2],
            )
        )  # fmt: skip
    return tuple(rows)


def _shares(front: _Measured, world: World, class_names: Sequence[str]) -> tuple[ShareRow, ...]:
    groups = [("all", np.ones(len(world.labels), bool))]
    groups += [(name, world.labels == k) for k, name in enumerate(class_names)]
    rows = []
    for point in np.unique(np.linspace(0, len(front.cost) - 1, 5).round().astype(int)):
        for name, member in groups:
            counts = np.bincount(front.decisions.choice[point, member], minlength=len(world.tree.paths))
            shares = {str(world.tree.paths[p]): float(counts[p] / member.sum()) for p in np.flatnonzero(counts)}
            rows.append(
                ShareRow(
                    price=front.decisions.prices[point] or 0.0, cost=front.cost[point], class_name=name,
                    n=int(member.sum()), shares=shares,
                )
            )  # fmt: skip
    return tuple(rows)


def _calibration(world: World) -> tuple[CalibrationRecord, ...]:
    records = []
    for gate in world.tree.gates:
        if gate == ROOT:
            continue
        columns = [world.tree.index[p] for p in world.tree.extensions(gate)]
        truth, errors = world.error_rate[:, columns], world.errors[:, columns]
        predicted = np.clip(0.9 * truth + 0.05 + world.rng.normal(0, 0.05, truth.shape), 0, 1)
        records.append(
            CalibrationRecord(
                gate=str(gate), n=len(errors), rmse=rmse(predicted, truth), brier=brier(predicted, errors),
                ece=expected_calibration_error(predicted, errors), bins=reliability_bins(predicted, errors),
            )
        )  # fmt: skip
    return tuple(records)


def _segment_cost(piece: str, bits: int, depth: int) -> SegmentCost:
    macs = {"stem": 2.1e6, "segment": 5.2e7 / depth, "head": 5.1e3, "gate": 9.0e3}[piece.split()[0]]
    return SegmentCost(piece=piece, bits=bits, macs=macs, bitops=macs * bits * bits, milliseconds=macs * 6e-9 + 2e-4)


def _clustering(clusters: int | None) -> dict[str, object]:
    known = {"shrinkage": 5.0, "clustering_features": "both", "algorithm": "kmeans"}
    return {"clusters": clusters, **(dict.fromkeys(known) if clusters is None else known)}


def _grid() -> tuple[GridRow, ...]:
    rows = []
    for k, (predictor, features) in enumerate([("mlp", "both"), ("mlp", "uncertainty"), ("logistic", "both")]):
        for j, clusters in enumerate([None, 20, 100]):
            point = {
                "predictor": predictor, "features": features,
                "options": '{"hidden":64}' if predictor == "mlp" else "{}",
                **_clustering(clusters),
            }  # fmt: skip
            rows.append(
                GridRow(
                    point=point, rmse=0.02 + 0.07 * (clusters is None) + 0.004 * k, brier=0.104 + 0.002 * k + 0.001 * j,
                    ece=0.011 + 0.003 * k + 0.004 * j, hypervolume=0.862 - 0.003 * k - 0.001 * j,
                    seconds=4.2 + k + j, winner=k == j == 0, failure=None,
                )
            )  # fmt: skip
    own = {"predictor": "nearest_cluster", "features": "both"}
    rows.append(
        GridRow(
            point={**own, "options": "{}", **_clustering(20)}, rmse=0.09, brier=0.113, ece=0.019, hypervolume=0.853,
            seconds=1.1, winner=False, failure=None,
        )
    )  # fmt: skip
    too_many = {**own, "options": '{"clusters":5000}', **_clustering(5000)}
    rows.append(
        GridRow(
            point=too_many, rmse=None, brier=None, ece=None, hypervolume=None, seconds=0.0, winner=False,
            failure="more clusters than images: 5000 clusters, 4500 images of target",
        )
    )  # fmt: skip
    return tuple(rows)
