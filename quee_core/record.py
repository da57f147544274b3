"""The finished record of a sweep: all that the report, the command line and MLflow show, and nothing to compute.

Costs are relative to the full-depth path at the highest bit-width unless a field says otherwise; accuracies and
rates are fractions in [0, 1]; `low` and `high` bound a 95 % interval (paired bootstrap over images).
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

MethodKind = Literal["quee", "part", "baseline", "bound"]  # a part of quee's is the front of one of its rules alone


class Frozen(BaseModel):
    """Base of all records: immutable, and refusing unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FrontPoint(Frozen):
    """One operating point, chosen without a look at `test` (where `chosen`) and measured on it."""

    setting: str  # what reproduces the point: "λ = 0.12", "8-4-2", "p_max, 4 bits, λ = 0.2"
    price: float | None  # λ, where the point has one
    cost: float
    accuracy: float
    low: float
    high: float
    n: int
    chosen: bool


class FrontRecord(Frozen):
    """The accuracy-cost front of one method on the test images."""

    method: str
    kind: MethodKind
    points: tuple[FrontPoint, ...]  # by ascending cost
    hypervolume: float  # mean accuracy over costs from the cheapest path to 1
    hypervolume_low: float
    hypervolume_high: float
    hypervolume_gain: float | None  # of quee over this method; None for quee itself
    hypervolume_gain_low: float | None
    hypervolume_gain_high: float | None


class BaselineNeeds(Frozen):
    """What it takes to have a baseline's front, tables given."""

    method: str
    labels: int  # images whose labels it was fitted, tuned and chosen by
    trainings: int  # of models or sets of gates, each for itself; 0 where thresholds or less are all there is
    trained: str  # what those are
    seconds: float  # to fit, tune and choose it, on the machine of the evaluation


class BudgetRow(Frozen):
    """QuEE at one budget, by time-sharing of its two neighbouring points, against the best baseline there."""

    budget: float
    accuracy: float
    low: float
    high: float
    n: int
    baseline: str
    baseline_accuracy: float
    difference: float
    difference_low: float
    difference_high: float


class DropRow(Frozen):
    """Cheapest cost at which a method stays within `drop` of the full path's accuracy; None if it never does."""

    drop: float
    method: str
    cost: float | None


class ShareRow(Frozen):
    """Share of the test images of one class (or "all") that answer by each path, at one price."""

    price: float
    cost: float
    class_name: str
    n: int
    shares: dict[str, float]  # by path, as text; only paths that are used


class ReliabilityBin(Frozen):
    """Mean prediction against the observed error rate of the rows that fall in one bin."""

    predicted: float
    observed: float
    count: int


class CalibrationRecord(Frozen):
    """Quality of the winning predictor at one gate, over its considered paths, on the test images."""

    gate: str
    n: int
    rmse: float  # against the targets of equation 3
    brier: float
    ece: float
    bins: tuple[ReliabilityBin, ...]


class SegmentCost(Frozen):
    """Simulated and measured cost of one piece of the network, per image.

    macs: of a gate's predictor, at `bits`, and of the embedding that it may take, at 8 bits; bitops counts them so.
    """

    piece: str  # "stem", "segment 1", "head 1", "gate 1"
    bits: int
    macs: float
    bitops: float
    milliseconds: float


class UniformAccuracy(Frozen):
    """Test accuracy of one uniform path."""

    bits: int
    exit: int
    cost: float
    accuracy: float
    low: float
    high: float
    n: int


class GridRow(Frozen):
    """One point of the grid: what was fitted, and how it did on `select`."""

    point: dict[str, Any]
    rmse: float | None
    brier: float | None
    ece: float | None
    hypervolume: float | None  # on `select`
    seconds: float
    winner: bool
    failure: str | None

    @property
    def described(self) -> str:
        """Which point it is, in a few words: predictor, clusters, and the options that are not the default ones."""
        options = "" if self.point["options"] == "{}" else f", {self.point['options']}"
        return f"{self.point['predictor']} with K = {self.point['clusters'] or '∞'}{options}"


class StageTiming(Frozen):
    """Time that one stage of the sweep took, and how much of its work was found in the store."""

    stage: str
    seconds: float
    images_per_second: float | None
    computed: int
    reused: int


class SweepRecord(Frozen):
    """Everything that one sweep found."""

    name: str
    created: str  # ISO 8601, UTC
    code_version: str
    dataset: str
    backbone: str
    device: str
    cost_unit: Literal["bitops", "milliseconds"]
    full_cost: float  # absolute cost of relative cost 1, in BitOps or ms per image
    cheapest_cost: float  # relative
    class_names: tuple[str, ...]
    exits: tuple[int, ...]
    bits: tuple[int, ...]
    paths: int
    splits: dict[str, int]  # images
    cautions: tuple[str, ...]  # what a reader must know before trusting the figures
    fronts: tuple[FrontRecord, ...]
    baselines: tuple[BaselineNeeds, ...] = ()  # none in records of before there was this field
    budgets: tuple[BudgetRow, ...]
    drops: tuple[DropRow, ...]
    shares: tuple[ShareRow, ...]
    calibration: tuple[CalibrationRecord, ...]
    segment_costs: tuple[SegmentCost, ...]
    uniform_accuracies: tuple[UniformAccuracy, ...]
    grid: tuple[GridRow, ...]
    timings: tuple[StageTiming, ...]
    config: dict[str, Any]
    versions: dict[str, str]
    seeds: dict[str, int]
    fingerprints: dict[str, str]


class Registration(Frozen):
    """What became of a sweep's router in the model registry: kept in the run's folder, beside the record."""

    model: str
    version: int
    champion: bool  # whether it is the one in service, when this was written
    line: str  # the same for a reader


def images_key(split: str) -> str:
    """Where a record's fingerprints have that of a split's images: ids, labels and contents, not preprocessed.

    Of `fit`, of those that were read: see `SweepPlan.split_fingerprint`.
    """
    return f"images of {split}"
