"""What a tracking server is told of a finished sweep: its record as flat names, numbers and tables."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quee_core.config import PricesConfig
from quee_core.fingerprints import fingerprint
from quee_core.record import FrontRecord, Frozen, SweepRecord
from quee_core.redaction import redacted

MAX_VALUE = 6000  # characters that MLflow takes of a parameter
STEPS = 1000  # of a front's metric: the full path's cost

Row = Mapping[str, Any]


def params_of(record: SweepRecord) -> dict[str, str]:
    """Every setting of a sweep under its dotted name, as text, without secrets.

    A value that is too long for MLflow is replaced by its fingerprint and by where it can be read.
    """
    return {name: _fitting(value) for name, value in _flat("", redacted(record.config))}


def tags_of(record: SweepRecord) -> dict[str, str]:
    """What runs are searched by: network, bit-widths, prices, code, data set, seeds."""
    prices = PricesConfig.model_validate(record.config.get("prices", {})).grid()
    positive = prices[prices > 0]
    span = f"{positive[0]:g} to {positive[-1]:g}" if len(positive) else "0"
    return {
        "quee.backbone": record.backbone,
        "quee.dataset": record.dataset,
        "quee.bits": "-".join(map(str, record.bits)),
        "quee.exits": "-".join(map(str, record.exits)),
        "quee.prices": span,
        "quee.price_count": str(len(prices)),
        "quee.seed": str(record.seeds.get("grid", "")),
        "quee.split_seed": str(record.seeds.get("splits", "")),
        "quee.code_version": record.code_version,
        "quee.cost_unit": record.cost_unit,
        "quee.device": record.device,
    }


def metrics_of(record: SweepRecord) -> list[tuple[str, float, int]]:
    """Name, value and step of every metric: summaries at step 0, fronts stepped by cost in thousandths.

    So one chart of `front_quee` draws the fronts of several sweeps, accuracy against cost.
    """
    metrics = [(f"hypervolume_{front.method}", front.hypervolume, 0) for front in record.fronts]
    metrics += [
        (f"hypervolume_gain_over_{front.method}", front.hypervolume_gain, 0)
        for front in record.fronts
        if front.hypervolume_gain is not None
    ]
    metrics += [(f"accuracy_at_{row.budget:g}", row.accuracy, 0) for row in record.budgets]
    metrics += [(f"gain_at_{row.budget:g}", row.difference, 0) for row in record.budgets]
    metrics += [
        (f"cost_at_drop_{row.drop:g}_{row.method}", row.cost, 0) for row in record.drops if row.cost is not None
    ]
    metrics += [
        ("cheapest_cost", record.cheapest_cost, 0),
        ("full_cost", record.full_cost, 0),
        ("seconds", sum(timing.seconds for timing in record.timings), 0),
    ]
    for front in record.fronts:
        metrics += [(f"front_{front.method}", accuracy, step) for step, accuracy in _steps(front)]
    return metrics


def tables_of(record: SweepRecord) -> dict[str, Sequence[Row]]:
    """Rows of each table by its name: points of all fronts, budgets, drops, baselines, grid, pieces and their cost."""
    points = [
        {"method": front.method, "kind": front.kind, **point.model_dump(), "absolute_cost": point.cost * whole}
        for whole in [record.full_cost]
        for front in record.fronts
        for point in front.points
    ]
    grid = [{**row.point, **row.model_dump(exclude={"point"})} for row in record.grid]
    return {
        "fronts": points, "budgets": _rows(record.budgets), "drops": _rows(record.drops), "grid": grid,
        "segment_costs": _rows(record.segment_costs), "uniform_paths": _rows(record.uniform_accuracies),
        "baselines": _rows(record.baselines),
    }  # fmt: skip


def front_summary(front: FrontRecord) -> str:
    """The ends of a front and its mean accuracy, in a line."""
    first, last = front.points[0], front.points[-1]
    return (
        f"{100 * first.accuracy:.2f} % at cost {first.cost:.3f} to {100 * last.accuracy:.2f} % at {last.cost:.3f}, "
        f"{100 * front.hypervolume:.2f} % on average, {len(front.points)} operating points"
    )


def _steps(front: FrontRecord) -> Iterator[tuple[int, float]]:
    """Cost in thousandths and accuracy, one a step: of points that round to the same cost the most accurate."""
    best: dict[int, float] = {}
    for point in front.points:
        step = round(STEPS * point.cost)
        best[step] = max(point.accuracy, best.get(step, 0.0))
    yield from sorted(best.items())


def _rows(records: Sequence[Frozen]) -> list[Row]:
    return [record.model_dump() for record in records]


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    inner: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        inner = [(str(key), each) for key, each in value.items()]
    elif isinstance(value, list | tuple) and any(isinstance(each, dict | list | tuple) for each in value):
        inner = [(str(k), each) for k, each in enumerate(value)]
    if inner:
        for key, each in inner:
            yield from _flat(f"{name}.{key}" if name else key, each)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)


def _fitting(value: str) -> str:
    if len(value) <= MAX_VALUE:
        return value
    return f"{len(value)} characters, whole in record.json; fingerprint {fingerprint(value)}"
