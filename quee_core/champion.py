"""Whether a new router is better than the one in service: their fronts, image by image, over absolute BitOps.

Relative costs of different backbones are shares of different wholes, and milliseconds are those of one device; so both
fronts are priced in BitOps per image, whatever the sweep's unit.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quee_core.archive import Arrays, pack, unpack
from quee_core.comparison import Estimate, run_outcomes
from quee_core.costs import CostTable, full_cost, path_costs, relative
from quee_core.deployment import load_router
from quee_core.errors import DamagedTableError, ShapeMismatchError, StoreError
from quee_core.evaluation import gate_decisions
from quee_core.fronts import at_budgets, hypervolume_per_image, paired_bootstrap
from quee_core.paths import PathTree
from quee_core.record import SegmentCost, SweepRecord, images_key
from quee_core.runs import router_folder
from quee_core.shipping import GateFront, GateRule, rule_decisions

KIND = "front of a router"
RESAMPLES = 2000
SHARED_NAMES = ("folder", "parquet")  # data sets of a user's own, told apart by their folder


@dataclass(frozen=True, eq=False)
class ServedFront:
    """What a router does with each test image at each of its operating points.

    sample_ids: int64 [n]. images: fingerprint of ids, labels and contents. cost: float64 [points], mean BitOps an
    image, ascending. correct: bool [points, n]. full_cost: BitOps of the full path at the highest bit-width.
    Raises ShapeMismatchError if they disagree, or there is no point or no image.
    """

    sample_ids: NDArray[np.int64]
    images: str
    cost: NDArray[np.float64]
    correct: NDArray[np.bool_]
    full_cost: float

    def __post_init__(self) -> None:
        if self.correct.shape != (len(self.cost), len(self.sample_ids)) or not self.correct.size:
            raise ShapeMismatchError(
                f"front of a router: {len(self.cost)} costs, {len(self.sample_ids)} images, answers "
                f"{self.correct.shape}; want [points, images], at least one of each"
            )

    def to_bytes(self) -> bytes:
        """As safetensors; equal fronts give equal bytes."""
        arrays: Arrays = {
            "sample_ids": self.sample_ids, "cost": self.cost, "correct": np.packbits(self.correct, axis=1),
            "full_cost": np.array([self.full_cost]),
        }  # fmt: skip
        return pack(arrays, {"images": self.images}, kind=KIND)

    @classmethod
    def from_bytes(cls, data: bytes) -> "ServedFront":
        """What `to_bytes` wrote. Raises DamagedTableError for anything else."""
        arrays, settings = unpack(data, kind=KIND)
        try:
            ids = arrays["sample_ids"]
            correct = np.unpackbits(arrays["correct"], axis=1, count=len(ids)).astype(bool)
            return cls(ids, str(settings["images"]), arrays["cost"], correct, float(arrays["full_cost"][0]))
        except (KeyError, IndexError, TypeError, ValueError, ShapeMismatchError) as error:
            raise DamagedTableError(f"not a {KIND} that quee wrote: {error}") from None


@dataclass(frozen=True)
class Contest:
    """A challenger against the champion.

    gain: in mean accuracy over the common range of costs; None where the two can't be compared. reason: one clause
    that says how it went.
    """

    better: bool
    gain: Estimate | None
    reason: str


def contest(challenger: ServedFront, champion: ServedFront, *, resamples: int = RESAMPLES, seed: int = 0) -> Contest:
    """Whether the challenger's front is clearly better: the 95 % interval of its paired gain lies above 0.

    An image's part of a front is its mean correctness, in expectation between neighbouring points, over costs from
    the dearer of the two cheapest points to the larger of the two full paths; where that is no range, at its upper
    end. Fronts on other test images are not compared, and nothing is better then.
    """
    if (why := _differing(challenger, champion)) is not None:
        return Contest(False, None, f"{why}, so they can't be compared")
    fronts = (challenger, champion)
    low, high = max(float(f.cost.min()) for f in fronts), max(f.full_cost for f in fronts)
    if low < high:
        ours, theirs = (hypervolume_per_image(f.cost, f.correct, low, high) for f in fronts)
    else:
        ours, theirs = (at_budgets(f.cost, f.correct, np.array([low]))[0] for f in fronts)
        high = low
    (mean,), (bottom,), (top,) = paired_bootstrap(
        (ours - theirs)[None], resamples=resamples, seed=seed, differences=[True]
    )
    told = (
        f"mean accuracy from {low:.3g} to {high:.3g} BitOps {100 * ours.mean():.2f} % against "
        f"{100 * theirs.mean():.2f} %, gain {100 * mean:+.2f} points, 95 % [{100 * bottom:+.2f}, {100 * top:+.2f}], "
        f"n = {len(ours)}"
    )
    if bottom > 0:
        return Contest(True, Estimate(mean, bottom, top), told)
    missed = f"{told}; the interval must lie above 0, and misses by {-100 * bottom:.2f}"
    return Contest(False, Estimate(mean, bottom, top), missed)


def served_front(record: SweepRecord, folder: FilePath) -> ServedFront:
    """The front of a finished run's router on its test images, from the router and the tables in its folder.

    Raises StoreError where they are gone, or the record is of a version of quee that kept no fingerprint of images.
    """
    if (images := record.fingerprints.get(images_key("test"))) is None:
        raise StoreError(f"run {record.name}: its record has no fingerprint of the test images; run the sweep again")
    deployed = load_router(router_folder(folder))
    policy, test = deployed.router.policy, run_outcomes(folder)[2]
    tree = policy.tree
    bitops = bitops_costs(record.segment_costs, tree)
    shipped = [point.as_shipped() for point in deployed.manifest.points]
    prices = sorted({point.rule.price for point in shipped if isinstance(point.rule, GateRule)})
    gates = None
    if prices:
        priced = relative(path_costs(bitops, tree.paths, evaluated="every"), bitops, tree)
        gates = GateFront(gate_decisions(policy, deployed.router.costs, np.array(prices), test), priced)
    ours = rule_decisions(shipped, bitops.without_gates(), tree, test, gates, deployed.router.revisions)
    cost = ours.cost
    order = np.argsort(cost, kind="stable")
    whole = full_cost(bitops, tree)
    return ServedFront(np.array(test.sample_ids), images, cost[order] * whole, ours.correct[order], whole)


def bitops_costs(rows: tuple[SegmentCost, ...], tree: PathTree) -> CostTable:
    """BitOps of every piece, the gates included, as a record lists them. Raises StoreError if one is missing."""
    by_piece: Mapping[tuple[str, int], float] = {(row.piece, row.bits): row.bitops for row in rows}
    heads = {row.piece: row.bitops for row in rows if row.piece.startswith("head ")}
    gates = {row.piece: row.bitops for row in rows if "gate" in row.piece}
    try:
        return CostTable(
            unit="bitops",
            stem=next(row.bitops for row in rows if row.piece.startswith("stem")),
            segments={b: tuple(by_piece[f"segment {k}", b] for k in range(1, tree.depth + 1)) for b in tree.bits},
            heads=tuple(heads[f"head {k}"] for k in range(1, tree.depth + 1)),
            gates=tuple(gates["root gate" if k == 0 else f"gate {k}"] for k in range(tree.depth)),
            batch_size=None,
        )
    except (KeyError, StopIteration) as error:
        raise StoreError(f"costs of the record: {error} is missing; run the sweep again") from None


def dataset_name(dataset: str, config: Mapping[str, Any]) -> str:
    """What a data set is called among registered models; a user's own has the name of its folder, or of the last part
    of its URL, in it.

    config: of a record. What is no letter, digit, "_", "." or "-" becomes "-".
    """
    section = config.get("dataset", {})
    url, root = section.get("url"), section.get("root")
    if dataset in SHARED_NAMES and (url or root) is not None:
        place = url.rstrip("/").rpartition("/")[2] if url else FilePath(root).resolve().name
        dataset = f"{dataset}-{place}"
    return re.sub(r"[^\w.-]", "-", dataset, flags=re.ASCII)


def _differing(one: ServedFront, other: ServedFront) -> str | None:
    if len(one.sample_ids) != len(other.sample_ids):
        return f"it was tested on {len(one.sample_ids)} images and the champion on {len(other.sample_ids)}"
    if not np.array_equal(one.sample_ids, other.sample_ids):
        return "it was tested on other images than the champion"
    if one.images != other.images:
        return "its test images have the same ids as the champion's, but other labels or contents"
    return None
