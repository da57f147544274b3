"""Cascades: what they cost, what they decide, and that leaving out a look that never answers changes neither."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quee_core.cascades import Cascade, decisions_of, look_costs, trimmed
from quee_core.costs import CostTable, path_costs
from quee_core.errors import ConfigError, InvalidPathError, ShapeMismatchError
from quee_core.paths import ROOT, Path, PathTree
from quee_core.tables import UNCERTAINTY
from tests.test_baselines import DATA, TREE

TABLE = CostTable(
    unit="bitops",
    stem=100.0,
    segments={2: (4.0, 5.0, 6.0), 4: (16.0, 20.0, 24.0), 8: (64.0, 80.0, 96.0)},
    heads=(1.0, 2.0, 3.0),
    gates=(0.0, 0.0, 0.0),
)
looks_of_the_tree = st.lists(st.sampled_from(TREE.paths), min_size=1, max_size=4, unique=True)


def path(text: str) -> Path:
    return Path.parse(text)


class TestCosts:
    def test_a_static_path_costs_what_it_costs(self) -> None:
        for each in TREE.paths:
            assert look_costs(TABLE, [each]).tolist() == path_costs(TABLE, [each], evaluated="final").tolist()

    @pytest.mark.parametrize("bits", TREE.bits)
    def test_a_ladder_of_all_exits_costs_what_dynamic_paths_do(self, bits: int) -> None:
        ladder = [Path((bits,) * k) for k in range(1, 4)]
        np.testing.assert_allclose(look_costs(TABLE, ladder), path_costs(TABLE, ladder, evaluated="every"))

    def test_common_beginnings_run_once(self) -> None:
        looks = [path("2"), path("4-4"), path("4-2"), path("2-2")]
        assert look_costs(TABLE, looks).tolist() == [105, 105 + 36 + 2, 143 + 5 + 2, 150 + 5 + 2]

    @given(looks_of_the_tree)
    def test_stem_segments_and_heads_are_counted_once_each(self, looks: list[Path]) -> None:
        found = look_costs(TABLE, looks)
        for k in range(len(looks)):
            made = looks[: k + 1]
            edges = {prefix for look in made for prefix in look.prefixes()} - {ROOT}
            segments = sum(TABLE.segments[edge.bits[-1]][edge.exit - 1] for edge in edges)
            assert found[k] == TABLE.stem + segments + sum(TABLE.heads[look.exit - 1] for look in made)

    def test_a_path_without_costs_is_named(self) -> None:
        with pytest.raises(InvalidPathError, match="look 3: no cost"):
            look_costs(TABLE, [path("2"), path("3")])


class TestDecisions:
    @given(looks_of_the_tree, st.sampled_from(UNCERTAINTY[:3]), st.integers(0, 2**32))
    def test_the_first_sure_look_answers(self, looks: list[Path], measure: str, seed: int) -> None:
        sign = -1 if measure == "entropy" else 1
        thresholds = tuple((sign * np.random.default_rng(seed).uniform(0, 1, len(looks) - 1)).tolist())
        cascade = Cascade(tuple(looks), measure, thresholds)
        column = UNCERTAINTY.index(measure)
        for image, taken in zip(range(40), cascade.decide(DATA.test), strict=False):
            sure = [
                k
                for k, threshold in enumerate(thresholds)
                if sign * float(DATA.test.uncertainty[image, TREE.index[looks[k]], column]) >= threshold
            ]
            assert taken == (sure[0] if sure else len(looks) - 1)

    @given(looks_of_the_tree, st.data())
    def test_what_never_answers_can_be_left_out(self, looks: list[Path], data: st.DataObject) -> None:
        ends = st.sampled_from([-math.inf, math.inf, 0.3, 0.6])
        thresholds = data.draw(st.lists(ends, min_size=len(looks) - 1, max_size=len(looks) - 1))
        cascade = trimmed(looks, "margin", thresholds)
        answered_by = [cascade.looks[k] for k in cascade.decide(DATA.test)]
        margin = DATA.test.uncertainty[..., UNCERTAINTY.index("margin")]
        for image, answer in enumerate(answered_by[:40]):
            known = zip(looks, [*thresholds, -math.inf], strict=True)
            assert answer == next(p for p, least in known if margin[image, TREE.index[p]] >= least)
        whole = dict(zip(looks, look_costs(TABLE, looks), strict=True))
        for look, cost in zip(cascade.looks, look_costs(TABLE, cascade.looks), strict=True):
            assert cost <= whole[look]

    def test_other_paths_have_no_cost(self) -> None:
        cascades = [Cascade((path("2"), path("4-4")), "margin", (0.5,)), Cascade((path("8"),), "margin", ())]
        for cascade in cascades:
            choice, costs = decisions_of(cascade, look_costs(TABLE, cascade.looks), DATA.test, TREE.index)
            used = {TREE.index[look] for look in cascade.looks}
            assert set(choice) <= used
            assert {k for k in range(len(TREE.paths)) if not math.isnan(costs[k])} == used

    def test_a_look_without_a_table_is_named(self) -> None:
        with pytest.raises(ShapeMismatchError, match="path 3: there is no table of it"):
            Cascade((path("2"), path("3")), "margin", (0.5,)).decide(DATA.test)


class TestWords:
    def test_text_names_every_digit(self) -> None:
        assert str(Cascade((path("2"), path("4-4")), "margin", (0.1 + 0.2,))) == "2 > 4-4, margin ≥ 0.30000000000000004"
        assert str(Cascade((path("2-2"),), "margin", ())) == "2-2"
        assert str(Cascade((path("2"), path("4")), "entropy", (-0.31,))) == "2 > 4, entropy ≤ 0.31"

    def test_journeys_name_what_ran_once(self) -> None:
        cascade = Cascade(tuple(map(path, ("2", "2-2", "4-4", "4-4-4"))), "margin", (0.1, 0.2, 0.3))
        assert [cascade.journey(k) for k in range(4)] == ["2", "2-2", "2-2 > 4-4", "2-2 > 4-4-4"]

    @pytest.mark.parametrize(
        ("looks", "measure", "thresholds", "error"),
        [
            ((), "margin", (), InvalidPathError),
            ((path("2"), path("2")), "margin", (0.1,), InvalidPathError),
            ((ROOT, path("2")), "margin", (0.1,), InvalidPathError),
            ((path("2"), path("4")), "margin", (), ConfigError),
            ((path("2"), path("4")), "margin", (math.inf,), ConfigError),
            ((path("2"), path("4")), "luck", (0.1,), ConfigError),
        ],
    )
    def test_what_is_no_cascade_is_refused(
        self, looks: tuple[Path, ...], measure: str, thresholds: tuple[float, ...], error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            Cascade(looks, measure, thresholds)


def test_every_ladder_is_a_cascade_that_goes_on() -> None:
    tree = PathTree.of((2, 4), 3, "monotone")
    for a, b in itertools.permutations(tree.paths, 2):
        costs = look_costs(TABLE, [a, b])
        alone = look_costs(TABLE, [b])[0]
        assert costs[1] >= alone + TABLE.heads[a.exit - 1]  # a look that was not sure is never free
        if b.extends(a):
            assert costs[1] == alone + TABLE.heads[a.exit - 1]  # but a ladder pays for its head alone
