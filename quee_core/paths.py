"""Paths through a segmented backbone, and the tree of those that a sweep keeps (design, sections 1 and 5)."""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from quee_core.errors import InvalidPathError

FULL_PRECISION = 32
EMBEDDING_BITS = 8  # of the products that an embedding comes from, and of those that correct an answer by it
BIT_WIDTHS = (2, 3, 4, 5, 6, 7, 8, FULL_PRECISION)

PolicyName = Literal["uniform", "monotone", "full", "sampled"]
MAX_PATHS = 100_000


@dataclass(frozen=True, slots=True, order=True)
class Path:
    """Bit-widths of the segments that ran, first segment first; `Path(())` is the root.

    Raises InvalidPathError for a bit-width that is not in `BIT_WIDTHS`.
    """

    bits: tuple[int, ...]

    def __post_init__(self) -> None:
        if unknown := [b for b in self.bits if b not in BIT_WIDTHS]:
            raise InvalidPathError(f"path {self}: bit-widths {unknown} are not among {list(BIT_WIDTHS)}")

    @property
    def exit(self) -> int:
        """Number of segments that ran: 0 at the root, L at full depth; exits are numbered from 1."""
        return len(self.bits)

    @property
    def is_uniform(self) -> bool:
        """Whether every segment ran at the same bit-width; the root is."""
        return len(set(self.bits)) <= 1

    @property
    def parent(self) -> "Path":
        """The path without its last segment. Raises InvalidPathError at the root."""
        if not self.bits:
            raise InvalidPathError("the root has no parent")
        return Path(self.bits[:-1])

    def child(self, bits: int) -> "Path":
        """The path that runs one more segment at `bits`."""
        return Path((*self.bits, bits))

    def extends(self, gate: "Path") -> bool:
        """Whether the path passes through `gate`; it extends itself and the root."""
        return self.bits[: gate.exit] == gate.bits

    def prefixes(self) -> Iterable["Path"]:
        """Every path on the way, the root first and the path itself last."""
        return (Path(self.bits[:k]) for k in range(self.exit + 1))

    def __str__(self) -> str:
        return "-".join(map(str, self.bits)) or "root"

    @classmethod
    def parse(cls, text: str) -> "Path":
        """Read back what `str` wrote ("8-4-2", "root"). Raises InvalidPathError for anything else."""
        if text == "root":
            return ROOT
        try:
            return cls(tuple(int(part) for part in text.split("-")))
        except ValueError:
            raise InvalidPathError(f"path {text!r}: want bit-widths joined by '-', such as 8-4-2, or 'root'") from None


ROOT = Path(())


@dataclass(frozen=True)
class PathTree:
    """The paths that a sweep keeps: a set closed under prefixes, the root not counted.

    bits: the bit-widths B, ascending. depth: L, the number of exits.
    paths: kept paths, ordered by exit and then by bit-widths; index k of a table's path axis is `paths[k]`.
    Raises InvalidPathError if the set is empty, not closed, or not made of `bits` and `depth`.
    """

    bits: tuple[int, ...]
    depth: int
    paths: tuple[Path, ...]

    def __post_init__(self) -> None:
        if not self.paths:
            raise InvalidPathError("a path tree needs at least one path")
        if list(self.paths) != sorted(set(self.paths), key=_tree_order):
            raise InvalidPathError("a path tree's paths must be distinct and ordered by exit, then bit-widths")
        known = set(self.paths) | {ROOT}
        for path in self.paths:
            if path.exit == 0 or path.exit > self.depth or not set(path.bits) <= set(self.bits):
                raise InvalidPathError(f"path {path}: not of bit-widths {self.bits} and depth {self.depth}")
            if path.parent not in known:
                raise InvalidPathError(f"path {path}: its prefix {path.parent} is not in the tree")

    @classmethod
    def of(
        cls, bits: Sequence[int], depth: int, policy: PolicyName, *, sampled_paths: int = 0, seed: int = 0
    ) -> "PathTree":
        """The tree that a path policy keeps.

        uniform: one bit-width throughout (K_B * L paths). monotone: bit-widths never rise. full: all.
        sampled: `sampled_paths` full-depth paths drawn without replacement under `seed`, with all their
        prefixes, and always the uniform paths. Raises InvalidPathError for bad bit-widths or depth, or a
        tree of more than 100,000 paths.
        """
        widths = check_bit_widths(bits)
        if depth < 1:
            raise InvalidPathError(f"depth {depth}: want at least one exit")
        uniform = {Path((b,) * depth) for b in widths}
        if policy == "uniform":
            leaves = uniform
        elif policy == "monotone":
            leaves = {Path(p) for p in itertools.combinations_with_replacement(reversed(widths), depth)}
        elif policy == "full":
            if sum(len(widths) ** k for k in range(1, depth + 1)) > MAX_PATHS:
                raise InvalidPathError(
                    f"{len(widths)} bit-widths and {depth} exits make more than {MAX_PATHS} paths: "
                    "use the path policy 'sampled' or 'monotone'"
                )
            leaves = {Path(p) for p in itertools.product(widths, repeat=depth)}
        else:
            leaves = uniform | _sampled_leaves(widths, depth, sampled_paths, seed)
        kept = {prefix for leaf in leaves for prefix in leaf.prefixes()} - {ROOT}
        return cls(widths, depth, tuple(sorted(kept, key=_tree_order)))

    @cached_property
    def index(self) -> dict[Path, int]:
        """Position of each path on a table's path axis."""
        return {path: k for k, path in enumerate(self.paths)}

    @cached_property
    def gates(self) -> tuple[Path, ...]:
        """Where a decision is taken: the root and every kept path with a kept continuation, in tree order."""
        inner = {path.parent for path in self.paths}
        return tuple(sorted(inner, key=_tree_order))

    @property
    def full_path(self) -> Path:
        """The path to full depth at the highest bit-width: relative cost 1."""
        return Path((max(self.bits),) * self.depth)

    def ladder(self, bits: int) -> tuple[Path, ...]:
        """The uniform paths at `bits`, exit 1 first, whether the tree keeps them or not."""
        return tuple(Path((bits,) * exit_) for exit_ in range(1, self.depth + 1))

    @property
    def edges(self) -> int:
        """Segments that one walk of the whole tree runs; each kept path is the end of one edge."""
        return len(self.paths)

    def extensions(self, gate: Path) -> tuple[Path, ...]:
        """Paths that a gate considers: the gate itself first (exit now; the root has none), then all beyond it."""
        return tuple(path for path in self.paths if path.extends(gate))

    def branch(self, first_bits: int) -> tuple[Path, ...]:
        """Kept paths whose first segment runs at `first_bits`: what one extraction task walks."""
        return tuple(path for path in self.paths if path.bits[0] == first_bits)


def check_bit_widths(bits: Sequence[int]) -> tuple[int, ...]:
    """`bits` as a sorted tuple. Raises InvalidPathError if empty, repeated, or not among `BIT_WIDTHS`."""
    if not bits:
        raise InvalidPathError(f"bits: empty; want some of {list(BIT_WIDTHS)}")
    if unknown := [b for b in bits if b not in BIT_WIDTHS]:
        raise InvalidPathError(f"bits: {unknown} are not among {list(BIT_WIDTHS)}")
    if len(set(bits)) != len(bits):
        raise InvalidPathError(f"bits: {list(bits)} names a bit-width twice")
    return tuple(sorted(bits))


def _tree_order(path: Path) -> tuple[int, tuple[int, ...]]:
    return path.exit, path.bits


def _sampled_leaves(widths: tuple[int, ...], depth: int, count: int, seed: int) -> set[Path]:
    if count < 1:
        raise InvalidPathError(f"sampled_paths: {count}; the path policy 'sampled' wants at least 1")
    total = len(widths) ** depth
    chosen = random.Random(seed).sample(range(total), min(count, total))
    return {Path(tuple(widths[rank // len(widths) ** k % len(widths)] for k in range(depth))) for rank in chosen}
