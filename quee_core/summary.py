"""From fitted gates and outcome tables to the finished record of a sweep."""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quee_core import __version__
from quee_core.costs import CostTable, Macs, backbone_macs
from quee_core.errors import NumericError
from quee_core.evaluation import (
    QUEE,
    PricedTree,
    absolute_full_cost,
    all_fronts,
    baseline_needs,
    budget_rows,
    budgets_of,
    calibration_records,
    drop_rows,
    front_records,
    gate_decisions,
    select_hypervolume,
    share_rows,
    uniform_accuracies,
    unreached_budgets,
)
from quee_core.exits import FittedExits
from quee_core.fingerprints import code_version, library_versions
from quee_core.grid import GateFit, GridPoint, assemble, mean_quality, targets_of
from quee_core.paths import FULL_PRECISION, ROOT
from quee_core.plan import SweepPlan
from quee_core.policy import GatePolicy
from quee_core.record import GridRow, SegmentCost, SweepRecord, images_key
from quee_core.redaction import redacted
from quee_core.revisions import Revisions
from quee_core.shipping import Shipped
from quee_core.tables import Outcomes

_EVALUATION_CODE = (
    "quee_core.evaluation", "quee_core.gates", "quee_core.fronts", "quee_core.summary", "quee_core.shipping",
    "quee_core.cascades", "quee_core.thresholds", "quee_core.teacher", "quee_core.baselines",
)  # fmt: skip
GateCosts = Callable[[GridPoint, GatePolicy], tuple[float, ...]]  # per exit, root first, in the cost table's unit


@dataclass(frozen=True, eq=False)
class Winner:
    """The grid point with the largest hypervolume on `select`, and how the others did."""

    point: GridPoint
    policy: GatePolicy
    costs: NDArray[np.float64]
    gates: tuple[float, ...]
    rows: tuple[GridRow, ...]


def choose_winner(
    points: Sequence[GridPoint],
    fits: Sequence[GateFit],
    priced: PricedTree,
    select: Outcomes,
    prices: NDArray[np.float64],
    gate_costs: GateCosts,
) -> Winner:
    """Replay every grid point on `select`, and take the best; a point that failed is reported, not chosen.

    Raises NumericError if every point failed, with the first, its parameters and why.
    """
    low = float(priced.final.min())
    found: list[tuple[GridRow, GatePolicy | None, NDArray[np.float64], tuple[float, ...]]] = []
    for point in points:
        own = [fit for fit in fits if fit.point == point]
        seconds = sum(fit.seconds for fit in own)
        policy = assemble(point, priced.tree, own)
        if isinstance(policy, str):
            row = GridRow(
                point=point.as_dict(), rmse=None, brier=None, ece=None, hypervolume=None, seconds=seconds, winner=False,
                failure=policy,
            )  # fmt: skip
            found.append((row, None, np.empty(0), ()))
            continue
        gates = gate_costs(point, policy)
        costs = priced.gated(gates)
        volume = select_hypervolume(gate_decisions(policy, costs, prices, select), select, costs, low)
        quality = mean_quality(own)
        row = GridRow(
            point=point.as_dict(), rmse=quality.rmse, brier=quality.brier, ece=quality.ece, hypervolume=volume,
            seconds=seconds, winner=False, failure=None,
        )  # fmt: skip
        found.append((row, policy, costs, gates))
    volumes = [-np.inf if row.hypervolume is None else row.hypervolume for row, *_ in found]
    best = int(np.argmax(volumes))
    first, winning, costs, gates = found[best]
    if winning is None:
        raise NumericError(f"every point of the grid failed; the first, {first.described}: {first.failure}")
    rows = tuple(r.model_copy(update={"winner": k == best}) for k, (r, *_) in enumerate(found))
    return Winner(points[best], winning, costs, gates, rows)


def summarise(
    plan: SweepPlan,
    exits: FittedExits,
    tables: tuple[CostTable, CostTable],
    winner: Winner,
    winner_gates: tuple[Sequence[float], Sequence[float]],
    shipped: Sequence[Shipped],
    revisions: Revisions | None,
    priced: PricedTree,
    outcomes: tuple[Outcomes, Outcomes, Outcomes],
    device: str,
) -> SweepRecord:
    """The record of a sweep, without timings.

    tables: BitOps and milliseconds; winner_gates: the winner's gates in both. shipped: the rules of quee's front.
    revisions: of their answers. outcomes: target, select and test.
    """
    config, settings = plan.config, plan.config.evaluation
    target, _, test = outcomes
    prices = config.prices.grid()
    low = float(priced.final.min())
    classes = plan.dataset.description.classes
    fronts = all_fronts(
        winner.policy, winner.gates, shipped, priced, outcomes, prices, len(classes), settings, revisions
    )
    budgets = budget_rows(fronts, settings, low)
    full_accuracy = float(1 - test.errors[:, plan.tree.index[plan.tree.full_path]].mean())
    wanted = {
        gate: targets_of(winner.point, gate, plan.tree, target, test, config.seed)
        for gate in plan.tree.gates
        if gate != ROOT
    }
    return SweepRecord(
        name=config.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        code_version=f"{__version__}+{code_version(_EVALUATION_CODE)[:12]}",
        dataset=plan.dataset.description.name,
        backbone=config.backbone.name,
        device=device,
        cost_unit=config.cost.unit,
        full_cost=absolute_full_cost(priced),
        cheapest_cost=low,
        class_names=classes,
        exits=plan.loaded.backbone.exits,
        bits=plan.tree.bits,
        paths=len(plan.tree.paths),
        splits=dict(plan.images),
        cautions=plan.cautions + unreached_budgets(budgets_of(settings, low), budgets, low),
        fronts=front_records(fronts, low, settings),
        baselines=baseline_needs(fronts),
        budgets=budgets,
        drops=drop_rows(fronts, full_accuracy),
        shares=share_rows(fronts[QUEE], plan.tree, test, classes),
        calibration=calibration_records(winner.policy, wanted, test),
        segment_costs=segment_costs(plan, exits, tables, winner.policy, winner_gates),
        uniform_accuracies=uniform_accuracies(priced, test),
        grid=winner.rows,
        timings=(),
        config=redacted(config.model_dump(mode="json")),
        versions=library_versions(),
        seeds={
            "splits": config.dataset.seed, "heads": config.heads.seed, "grid": config.seed, "paths": config.paths.seed,
            "bootstrap": settings.seed,
        },
        fingerprints={
            "backbone": plan.loaded.fingerprint,
            "calibration": plan.calibration_key,
            "exits": plan.exits_key,
            "preprocessing": plan.preprocessing.fingerprint(),
            **{images_key(split): plan.split_fingerprint(split) for split in plan.splits},
        },
    )  # fmt: skip


def segment_costs(
    plan: SweepPlan,
    exits: FittedExits,
    tables: tuple[CostTable, CostTable],
    policy: GatePolicy,
    gates: tuple[Sequence[float], Sequence[float]],
) -> tuple[SegmentCost, ...]:
    """MACs, BitOps and milliseconds of every piece of the network, per image."""
    bitops, measured = tables
    macs, edge, stem = backbone_macs(plan.loaded.backbone), plan.edge_bits, plan.stem_bits
    rows = [
        SegmentCost(
            piece="stem" if stem == edge else f"stem, its first layer at {edge}", bits=stem, macs=macs.stem.total,
            bitops=bitops.stem, milliseconds=measured.stem,
        )
    ]  # fmt: skip
    for bits in plan.tree.bits:
        rows += [
            SegmentCost(
                piece=f"segment {k + 1}", bits=bits, macs=part.total, bitops=bitops.segments[bits][k],
                milliseconds=measured.segments[bits][k],
            )
            for k, part in enumerate(macs.segments)
        ]  # fmt: skip
    own = macs.final or Macs(0, 0)
    for k, head in enumerate(exits.head_macs()):
        rows.append(
            SegmentCost(
                piece=f"head {k + 1}", bits=edge, macs=own.total if head is None else head, bitops=bitops.heads[k],
                milliseconds=measured.heads[k],
            )
        )  # fmt: skip
    decisions = policy.macs(plan.tree.depth, projection_macs=exits.projection_macs)
    for k in range(plan.tree.depth):
        rows.append(
            SegmentCost(
                piece="root gate" if k == 0 else f"gate {k}", bits=FULL_PRECISION, macs=decisions[k],
                bitops=gates[0][k], milliseconds=gates[1][k],
            )
        )  # fmt: skip
    return tuple(rows)
