"""Paths and path trees: text forms, policies, closure."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quee_core.errors import InvalidPathError
from quee_core.paths import BIT_WIDTHS, ROOT, Path, PathTree

paths = st.builds(Path, st.lists(st.sampled_from(BIT_WIDTHS), max_size=6).map(tuple))
bit_sets = st.lists(st.sampled_from(BIT_WIDTHS), min_size=1, max_size=4, unique=True)
policies = st.sampled_from(["uniform", "monotone", "full", "sampled"])


@given(paths)
def test_text_form_parses_back_to_an_equal_path(path: Path) -> None:
    assert Path.parse(str(path)) == path


@pytest.mark.parametrize("text", ["", "8-", "8-x", "rot", "8--4"])
def test_what_is_no_path_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidPathError, match=r"8-4-2"):
        Path.parse(text)


@given(paths, st.sampled_from(BIT_WIDTHS))
def test_a_child_extends_all_its_prefixes(path: Path, bits: int) -> None:
    child = path.child(bits)
    assert child.parent == path
    assert all(child.extends(prefix) for prefix in child.prefixes())
    assert not path.extends(child)


@given(bit_sets, st.integers(1, 4), policies, st.integers(0, 5))
def test_a_tree_is_closed_and_its_gates_lead_on(bits: list[int], depth: int, policy, seed: int) -> None:
    tree = PathTree.of(bits, depth, policy, sampled_paths=7, seed=seed)
    known = set(tree.paths) | {ROOT}
    assert all(path.parent in known for path in tree.paths)
    assert {Path((b,) * depth) for b in bits} <= set(tree.paths)
    assert tree.gates[0] == ROOT
    for gate in tree.gates:
        assert any(gate.child(b) in tree.index for b in tree.bits)
        assert all(path.extends(gate) for path in tree.extensions(gate))
    assert sorted(p for b in tree.bits for p in tree.branch(b)) == sorted(tree.paths)


@given(bit_sets, st.integers(1, 4))
def test_policies_keep_the_number_of_paths_that_they_promise(bits: list[int], depth: int) -> None:
    k = len(bits)
    assert len(PathTree.of(bits, depth, "uniform").paths) == k * depth
    assert len(PathTree.of(bits, depth, "full").paths) == sum(k**exit_ for exit_ in range(1, depth + 1))
    monotone = PathTree.of(bits, depth, "monotone")
    assert all(list(p.bits) == sorted(p.bits, reverse=True) for p in monotone.paths)
    falling = [p for p in PathTree.of(bits, depth, "full").paths if list(p.bits) == sorted(p.bits, reverse=True)]
    assert list(monotone.paths) == falling


def test_sampling_is_seeded_and_never_draws_more_than_there_is() -> None:
    trees = [PathTree.of([2, 4], 3, "sampled", sampled_paths=3, seed=seed) for seed in (1, 1, 2)]
    assert trees[0] == trees[1]
    assert PathTree.of([2, 4], 3, "sampled", sampled_paths=99).paths == PathTree.of([2, 4], 3, "full").paths


@pytest.mark.parametrize(
    ("bits", "named"), [([], "empty"), ([0], r"\[0\]"), ([1, 4], r"\[1\]"), ([33], r"\[33\]"), ([4, 4], "twice")]
)
def test_impossible_bit_widths_are_named(bits: list[int], named: str) -> None:
    with pytest.raises(InvalidPathError, match=named):
        PathTree.of(bits, 2, "full")


def test_a_tree_that_explodes_is_refused_with_a_way_out() -> None:
    with pytest.raises(InvalidPathError, match="sampled"):
        PathTree.of([2, 3, 4, 8], 12, "full")


def test_an_open_tree_is_refused() -> None:
    with pytest.raises(InvalidPathError, match="prefix"):
        PathTree((2, 4), 2, (Path((4, 2)),))
