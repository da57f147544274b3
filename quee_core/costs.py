"""What a path costs: multiply-accumulates, BitOps and measured time, behind one table (design, section 2)."""

import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from quee_core.backbones.segmented import SegmentedBackbone
from quee_core.errors import BackboneError, ConfigError, InvalidPathError, NumericError, ShapeMismatchError
from quee_core.paths import FULL_PRECISION, Path, PathTree, check_bit_widths

CostUnit = Literal["bitops", "milliseconds"]
PieceKind = Literal["stem", "segment", "head"]

EDGE_BITS = 8

# Work that BitOps leave out by definition: sums, elementwise functions, norms, pooling and moving data. Everything that
# is neither here nor counted as a product stops the count. Names of torch's operators, without overloads.
_WITHOUT_PRODUCTS = frozenset(
    f"aten.{name}"
    for name in (
        "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_safe_softmax", "_softmax", "_to_copy",
        "_unsafe_view", "adaptive_avg_pool2d", "add", "add_", "avg_pool2d", "cat", "clone", "constant_pad_nd",
        "copy_", "div", "div_", "empty", "exp", "gelu", "im2col", "max_pool2d_with_indices", "mean", "mul", "mul_",
        "native_batch_norm", "native_group_norm", "native_layer_norm", "pow", "relu", "relu_", "rsqrt", "sigmoid",
        "silu", "stack", "sub", "sum", "tanh",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Macs:
    """Multiply-accumulates for one image.

    linear: of weights and activations, in linear and convolutional layers.
    attention: of activations and activations, in the two products of attention.
    """

    linear: int
    attention: int

    @property
    def total(self) -> int:
        """Of both kinds."""
        return self.linear + self.attention

    def bitops(self, bits: int) -> int:
        """BitOps when weights and activations both have `bits` bits: MACs times the widths of the two factors."""
        weight_bits = activation_bits = bits
        return self.linear * weight_bits * activation_bits + self.attention * activation_bits**2


@dataclass(frozen=True, slots=True)
class BackboneMacs:
    """Multiply-accumulates of a backbone's pieces for one image; `final` is None if it has no head of its own.

    first: of the stem's first layer, the one that sees the image; a part of `stem`.
    """

    stem: Macs
    first: Macs
    segments: tuple[Macs, ...]
    final: Macs | None

    @property
    def behind_first(self) -> Macs:
        """Of the stem without its first layer."""
        return Macs(self.stem.linear - self.first.linear, self.stem.attention - self.first.attention)


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the network that is timed: `stem` (index 0), `segment` or `head` (indices from 1), at a bit-width."""

    kind: PieceKind
    index: int
    bits: int


@dataclass(frozen=True)
class CostTable:
    """Cost per image of every piece of a network with L exits, in one unit, whatever the cost model.

    unit: BitOps, or milliseconds on one device. stem: of the part before the first segment. segments: by bit-width,
    the cost of each of the L segments. heads: of the head at each exit, 1 to L. gates: of the gate at each exit,
    0 (the root) to L - 1; 0.0 where none is fitted. batch_size: images at a time when time was measured, else None.
    Raises ShapeMismatchError if lengths disagree, NumericError for a cost that is negative or not finite.
    """

    unit: CostUnit
    stem: float
    segments: Mapping[int, tuple[float, ...]]
    heads: tuple[float, ...]
    gates: tuple[float, ...]
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_bit_widths(list(self.segments))
        for label, row in (
            *((f"segments at {b} bits", row) for b, row in self.segments.items()),
            ("gates", self.gates),
        ):
            if len(row) != self.depth:
                raise ShapeMismatchError(f"costs: {len(row)} {label} and {self.depth} heads; want one for each exit")
        for piece, cost in self._named():
            if not (math.isfinite(cost) and cost >= 0):
                raise NumericError(f"costs: {piece} costs {cost}; want a finite number that is not negative")

    @property
    def depth(self) -> int:
        """L, the number of exits."""
        return len(self.heads)

    @property
    def bits(self) -> tuple[int, ...]:
        """Bit-widths at which segments have a cost, ascending."""
        return tuple(sorted(self.segments))

    def check_holds(self, path: Path, called: str = "path") -> None:
        """Raises InvalidPathError, which calls it `called`, for a path that the table has no costs for."""
        if not 1 <= path.exit <= self.depth or not set(path.bits) <= set(self.bits):
            raise InvalidPathError(
                f"{called} {path}: no cost for it in a table of {self.depth} exits and bits {self.bits}"
            )

    def without_gates(self) -> "CostTable":
        """A copy in which gates are free."""
        return self.with_gates((0.0,) * self.depth)

    def with_gates(self, gates: Sequence[float]) -> "CostTable":
        """A copy in which the gate at exit k, from the root on, costs `gates[k]`, in the table's unit."""
        return replace(self, gates=tuple(float(cost) for cost in gates))

    def to_json(self) -> str:
        """Text that `from_json` reads back as an equal table."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "CostTable":
        """Read back what `to_json` wrote. Raises ConfigError for anything else."""
        try:
            fields = json.loads(text)
            fields["segments"] = {int(bits): tuple(row) for bits, row in fields["segments"].items()}
            return cls(**(fields | {"heads": tuple(fields["heads"]), "gates": tuple(fields["gates"])}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not a cost table: {error!r}") from error

    def _named(self) -> list[tuple[str, float]]:
        named = [("the stem", self.stem)]
        named += [
            (f"segment {k} at {bits} bits", c) for bits, row in self.segments.items() for k, c in enumerate(row, 1)
        ]
        named += [(f"head {k}", cost) for k, cost in enumerate(self.heads, 1)]
        return named + [(f"gate {k}", cost) for k, cost in enumerate(self.gates)]


def edge_bits(bits: Sequence[int]) -> int:
    """Bit-width of stem and heads where none is asked for: 8, unless all of `bits` are more (design, section 2)."""
    return EDGE_BITS if min(check_bit_widths(bits)) <= EDGE_BITS else FULL_PRECISION


def module_macs(module: nn.Module, example: Tensor) -> Macs:
    """Multiply-accumulates that `module` does for one image, by running it without storage ("meta" device).

    example: float [n, …], an input of the module; its values and n do not matter. torch's FlopCounterMode counts the
    matrix products and convolutions that really run, with attention taken apart into its two products, since the fused
    CPU kernel has no count. Products outside linear and convolutional layers are those of attention.
    Raises BackboneError that names module and operator for arithmetic whose cost is not known.
    """
    linear, attention = _products(module, example)
    return Macs(sum(linear.values()), attention)


def _products(module: nn.Module, example: Tensor) -> tuple[dict[str, int], int]:
    """What `module_macs` counts: of every layer with weights, by name and in order, and of attention."""
    # sharing `meta` tensors through the memo, the copy never holds a second set of weights
    tensors: dict[int, Tensor] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in module.parameters()
    }
    tensors |= {id(b): b.detach().to("meta") for b in module.buffers()}
    weightless = copy.deepcopy(module, tensors).eval()
    images = torch.empty((1, *example.shape[1:]), dtype=example.dtype, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _KnownOperators(counter, weightless), counter:
        weightless(images)
    flops = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    weighted = (name for name, part in _tracked(weightless) if isinstance(part, nn.Linear | nn.Conv2d))
    linear = {name: flops.get(name, 0) // 2 for name in weighted}
    return linear, counter.get_total_flops() // 2 - sum(linear.values())


def backbone_macs(backbone: SegmentedBackbone) -> BackboneMacs:
    """Multiply-accumulates of every piece of `backbone`, at its own image size. Raises as `module_macs` does."""
    dtype = next(backbone.parameters()).dtype
    images = torch.empty((1, *backbone.image_shape), dtype=dtype, device="meta")
    tokens = torch.empty((1, backbone.num_tokens, backbone.embed_dim), dtype=dtype, device="meta")
    stem, in_attention = _products(backbone.stem, images)
    return BackboneMacs(
        stem=Macs(sum(stem.values()), in_attention),
        first=Macs(next(iter(stem.values()), 0), 0),
        segments=tuple(module_macs(part, tokens) for part in backbone.segments),
        final=None if backbone.final is None else module_macs(backbone.final, tokens),
    )


def bitops_table(
    macs: BackboneMacs | SegmentedBackbone,
    head_macs: Sequence[int | None],
    bits: Sequence[int],
    *,
    edge: int | None = None,
    stem: int | None = None,
) -> CostTable:
    """BitOps of every piece: MACs x bits of weights x bits of activations (design, section 2).

    macs: of the backbone, or the backbone itself. head_macs: multiply-accumulates of the head at each exit, 1 to L;
    None at the last exit for the backbone's own head. bits: the bit-widths B. edge: that of stem and heads; by default
    `edge_bits(bits)`. stem: that of the stem behind its first layer; by default `edge`.
    Raises ShapeMismatchError if there is not one head for each exit, BackboneError if the own head is asked for and
    there is none, or as `module_macs` does.
    """
    counted = backbone_macs(macs) if isinstance(macs, SegmentedBackbone) else macs
    depth = len(counted.segments)
    if len(head_macs) != depth:
        raise ShapeMismatchError(f"costs: {len(head_macs)} heads and {depth} segments; want one for each exit")
    if None in head_macs[:-1] or (head_macs[-1] is None and counted.final is None):
        raise BackboneError(
            "costs: only the last exit can have the backbone's own head, and only if the backbone has one"
        )
    edge = edge or edge_bits(bits)
    own = counted.final.bitops(edge) if counted.final is not None else 0
    return CostTable(
        unit="bitops",
        stem=float(counted.first.bitops(edge) + counted.behind_first.bitops(stem or edge)),
        segments={b: tuple(float(part.bitops(b)) for part in counted.segments) for b in check_bit_widths(bits)},
        heads=tuple(float(own if m is None else Macs(m, 0).bitops(edge)) for m in head_macs),
        gates=(0.0,) * depth,
    )


def measured_table(
    prepare: Callable[[Piece], Callable[[], object]],
    *,
    bits: Sequence[int],
    depth: int,
    batch_size: int,
    edge: int | None = None,
    repeats: int = 7,
    warm_up: int = 2,
    synchronize: Callable[[], object] | None = None,
) -> CostTable:
    """Milliseconds per image of every piece, on the device at hand.

    prepare: for a piece, what runs it once on `batch_size` images; only that run is timed. Asked for the stem and the
    heads at `edge` bits, by default `edge_bits(bits)`, and for each of `depth` segments at each of `bits`. synchronize:
    waits until the device has done its work (`devices.synchronize`), where runs return before that. Each piece runs
    `warm_up` times untimed, then `repeats` times, and counts with the median. The rounds go over all pieces in turn, so
    that a machine that is slower for a while is slower for all of them.
    Raises ConfigError for counts below 1 (`warm_up`: below 0).
    """
    widths, edge = check_bit_widths(bits), edge or edge_bits(bits)
    if min(depth, batch_size, repeats) < 1 or warm_up < 0:
        raise ConfigError(
            f"measured costs: depth {depth}, batch_size {batch_size}, repeats {repeats}, warm_up {warm_up}: "
            "want at least 1, 1, 1 and 0"
        )
    indices = range(1, depth + 1)
    pieces = [Piece("stem", 0, edge), *(Piece("segment", k, b) for b in widths for k in indices)]
    pieces += [Piece("head", k, edge) for k in indices]
    runs = {piece: prepare(piece) for piece in pieces}
    seconds: dict[Piece, list[float]] = {piece: [] for piece in pieces}
    wait = synchronize or _nothing
    for round_ in range(warm_up + repeats):
        for piece, run in runs.items():
            wait()
            started = time.perf_counter()
            run()
            wait()
            if round_ >= warm_up:
                seconds[piece].append(time.perf_counter() - started)
    cost = {piece: 1e3 * statistics.median(taken) / batch_size for piece, taken in seconds.items()}
    return CostTable(
        unit="milliseconds",
        stem=cost[Piece("stem", 0, edge)],
        segments={b: tuple(cost[Piece("segment", k, b)] for k in indices) for b in widths},
        heads=tuple(cost[Piece("head", k, edge)] for k in indices),
        gates=(0.0,) * depth,
        batch_size=batch_size,
    )


def path_costs(table: CostTable, paths: Sequence[Path], *, evaluated: Literal["final", "every"]) -> NDArray[np.float64]:
    """Cost float64 [paths] of each of `paths`, in the table's unit.

    evaluated: "final", what a static path runs: stem, segments and the head of its last exit. "every", what a dynamic
    one runs: stem, segments, the head of every exit on the way, and the gate at the root and at every exit passed or
    stopped at; there is no gate at exit L. Raises InvalidPathError for a path that the table has no costs for.
    """
    heads, gates = np.asarray(table.heads), np.asarray(table.gates)
    if evaluated == "final":
        at_exit = heads
    else:
        at_exit = np.cumsum(heads) + np.cumsum(gates)[np.minimum(np.arange(1, table.depth + 1), table.depth - 1)]
    widths = np.asarray(table.bits)
    segments = np.asarray([table.segments[b] for b in table.bits])
    costs = np.empty(len(paths))
    by_exit: dict[int, list[int]] = {}
    for row, path in enumerate(paths):
        table.check_holds(path)
        by_exit.setdefault(path.exit, []).append(row)
    for exit_, rows in by_exit.items():
        width = np.searchsorted(widths, [paths[row].bits for row in rows])
        costs[rows] = table.stem + segments[width, np.arange(exit_)].sum(axis=1) + at_exit[exit_ - 1]
    return costs


def full_cost(table: CostTable, tree: PathTree) -> float:
    """Cost of relative cost 1: the static path to full depth at the tree's highest bit-width, in the table's unit."""
    return float(path_costs(table, [tree.full_path], evaluated="final")[0])


def relative(costs: NDArray[np.float64], table: CostTable, tree: PathTree) -> NDArray[np.float64]:
    """`costs` float64 [...], in the table's unit, as shares of `full_cost`. Raises NumericError if that is 0."""
    full = full_cost(table, tree)
    if full == 0:
        raise NumericError("costs: the full path costs nothing, so no cost can be relative to it")
    return costs / full


class _KnownOperators(TorchDispatchMode):
    """Stops at an operator that neither `counter` counts nor `_WITHOUT_PRODUCTS` names.

    Entered before the counter, so that it sees operators after the counter has taken composite ones apart.
    """

    def __init__(self, counter: FlopCounterMode, root: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counter = counter
        self._root = root

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = func.overloadpacket
        if not (func.is_view or operator in self._counter.flop_registry or str(operator) in _WITHOUT_PRODUCTS):
            running = self._counter.mod_tracker.parents
            name, module = max(
                ((name, part) for name, part in _tracked(self._root) if name in running), key=lambda p: p[0].count(".")
            )
            raise BackboneError(
                f"costs: {type(module).__name__} ({name}) runs {operator}, whose multiply-accumulates are not known; "
                "a cost of 0 would be wrong, so nothing is counted"
            )
        return func(*args, **(kwargs or {}))


def _tracked(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under the name that torch's module tracker gives it."""
    top = type(root).__name__
    return [(f"{top}.{name}" if name else top, part) for name, part in root.named_modules()]


def _nothing() -> None:
    """What waits for a device that has always finished."""
