"""One battery of checks that every registered predictor passes, and what each of them is by itself."""

import io
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.tree import DecisionTreeRegressor
from threadpoolctl import threadpool_limits

from quee_core.clusters import cluster
from quee_core.errors import ConfigError, DamagedTableError, NumericError, ShapeMismatchError
from quee_core.fixed_point import sigmoid
from quee_core.predictors import PREDICTORS, Predictor, make_predictor
from quee_core.predictors.base import prior_logits
from quee_core.predictors.boosted_trees import BoostedTreesPredictor, complete_layout, leaf_of
from quee_core.predictors.logistic import LogisticPredictor
from quee_core.predictors.mlp import MLPPredictor
from quee_core.predictors.nearest_cluster import NearestClusterPredictor
from quee_core.predictors.quality import brier, expected_calibration_error, reliability_bins, rmse

QUICK: Mapping[str, dict[str, Any]] = {"mlp": {"epochs": 25, "batch": 128}, "boosted_trees": {"trees": 25}}
NAMES = sorted(PREDICTORS)
SEEDS = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Rows:
    """Images that passed one gate."""

    features: NDArray[np.float32]
    errors: NDArray[np.bool_]

    @property
    def targets(self) -> NDArray[np.float64]:
        return self.errors.astype(np.float64)


@dataclass(frozen=True)
class Gate:
    """Handwritten digits, classified from more and more of their pixels; the gate sees the first classifier."""

    target: Rows
    select: Rows
    test: Rows


@pytest.fixture(scope="module")
def gate() -> Gate:
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = pixels[order] / 16, labels[order]
    fit, wrong, features = slice(0, 300), [], np.zeros((len(labels), 0))
    for rows_of_pixels in (3, 4, 5, 8):
        seen = np.column_stack([pixels[:, : 8 * rows_of_pixels], np.ones(len(labels))])
        penalty = np.eye(seen.shape[1])
        weight = np.linalg.solve(seen[fit].T @ seen[fit] + penalty, seen[fit].T @ np.eye(10)[labels[fit]])
        scores = seen @ weight
        wrong.append(scores.argmax(axis=1) != labels)
        if not features.size:
            top = -np.sort(-scores, axis=1)
            features = np.column_stack([top[:, :4], top[:, 0] - top[:, 1], seen[:, 10:13]]).astype(np.float32)
    errors = np.column_stack(wrong)
    parts = (slice(300, 1100), slice(1100, 1400), slice(1400, None))
    return Gate(*(Rows(features[part], errors[part]) for part in parts))


@pytest.fixture(scope="module")
def fitted(gate: Gate) -> Mapping[str, Predictor]:
    return {name: fit(name, gate) for name in NAMES}


def fit(name: str, gate: Gate, *, seed: int = 0, targets: NDArray[np.float64] | None = None) -> Predictor:
    validation = (gate.select.features, gate.select.errors)
    goals = gate.target.targets if targets is None else targets
    return make_predictor(name, QUICK.get(name)).fit(gate.target.features, goals, validation=validation, seed=seed)


each_predictor = pytest.mark.parametrize("name", NAMES)


def test_the_registry_holds_what_the_design_names_and_cannot_be_changed() -> None:
    assert set(NAMES) == {"mlp", "logistic", "boosted_trees", "nearest_cluster", "constant"}
    with pytest.raises(TypeError):
        PREDICTORS["other"] = MLPPredictor  # type: ignore[index]
    assert [PREDICTORS[name].name for name in NAMES] == NAMES


@each_predictor
def test_predictions_are_probabilities_even_of_outlandish_rows(
    fitted: Mapping[str, Predictor], gate: Gate, name: str
) -> None:
    outlandish = np.vstack([gate.test.features, 1e6 * gate.test.features, -1e30 * gate.test.features])
    predicted = fitted[name].predict(outlandish)
    assert predicted.dtype == np.float64
    assert predicted.shape == (len(outlandish), 4)
    assert ((predicted >= 0) & (predicted <= 1)).all()


@each_predictor
def test_predictors_beat_the_overall_rates_on_images_they_never_saw(
    fitted: Mapping[str, Predictor], gate: Gate, name: str
) -> None:
    predicted = fitted[name].predict(gate.test.features)
    naive = brier(np.tile(gate.target.targets.mean(axis=0), (len(predicted), 1)), gate.test.errors)
    assert brier(predicted, gate.test.errors) < (0.97 * naive if name != "constant" else naive + 1e-12)


@each_predictor
def test_a_row_alone_is_predicted_bit_for_bit_as_in_a_batch(
    fitted: Mapping[str, Predictor], gate: Gate, name: str
) -> None:
    batch = fitted[name].predict(gate.test.features)
    alone = np.vstack([fitted[name].predict(row[None]) for row in gate.test.features])
    np.testing.assert_array_equal(alone, batch)


@given(seed=SEEDS, size=st.integers(1, 397))
@each_predictor
def test_regrouped_batches_are_predicted_bit_for_bit_alike(
    fitted: Mapping[str, Predictor], gate: Gate, name: str, seed: int, size: int
) -> None:
    batch = fitted[name].predict(gate.test.features)
    regrouped = np.random.default_rng(seed).permutation(len(batch))[:size]
    np.testing.assert_array_equal(fitted[name].predict(gate.test.features[regrouped]), batch[regrouped])


@each_predictor
def test_neither_layout_nor_float_width_of_features_changes_a_bit(
    fitted: Mapping[str, Predictor], gate: Gate, name: str
) -> None:
    features = gate.test.features
    for same in (np.asfortranarray(features), features.astype(np.float64), np.repeat(features, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(fitted[name].predict(same), fitted[name].predict(features))


@each_predictor
def test_the_seed_alone_decides_and_no_global_generator_moves(
    fitted: Mapping[str, Predictor], gate: Gate, name: str
) -> None:
    np.random.seed(1)
    torch.manual_seed(1)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    again = fit(name, gate)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    np.testing.assert_array_equal(again.predict(gate.test.features), fitted[name].predict(gate.test.features))
    fit(name, gate, seed=2**70)  # any integer is a seed


@each_predictor
def test_rows_of_select_are_looked_at_and_never_fitted(gate: Gate, name: str) -> None:
    # twice the same rows: the same score at every stop, but twice the weight for whoever fits them
    twice = (np.tile(gate.select.features, (2, 1)), np.tile(gate.select.errors, (2, 1)))
    goals = gate.target.targets
    doubled = make_predictor(name, QUICK.get(name)).fit(gate.target.features, goals, validation=twice)
    flipped_select = (gate.select.features, ~gate.select.errors)
    flipped = make_predictor(name, QUICK.get(name)).fit(gate.target.features, goals, validation=flipped_select)
    plain = fit(name, gate).predict(gate.test.features)
    np.testing.assert_array_equal(doubled.predict(gate.test.features), plain)
    if name in ("mlp", "boosted_trees"):  # these stop where select says, at the latest where they would run out
        assert abs(flipped.predict(gate.test.features).mean() - goals.mean()) < 0.1
    else:
        np.testing.assert_array_equal(flipped.predict(gate.test.features), plain)


@each_predictor
def test_a_stored_predictor_predicts_the_same_bits(fitted: Mapping[str, Predictor], gate: Gate, name: str) -> None:
    file = io.BytesIO()
    np.savez(file, **fitted[name].to_arrays())
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        restored = PREDICTORS[name].from_arrays(dict(arrays))
    copied = pickle.loads(pickle.dumps(fitted[name]))
    for other in (restored, copied):
        np.testing.assert_array_equal(other.predict(gate.test.features), fitted[name].predict(gate.test.features))
        assert other.macs == fitted[name].macs
        assert other.options == fitted[name].options


@each_predictor
def test_damaged_arrays_are_refused(fitted: Mapping[str, Predictor], name: str) -> None:
    arrays = fitted[name].to_arrays()
    for absent in arrays:
        with pytest.raises(DamagedTableError, match=rf"{name}|clustering"):
            PREDICTORS[name].from_arrays({k: v for k, v in arrays.items() if k != absent})
    with pytest.raises(DamagedTableError, match="4 paths, not 5"):
        PREDICTORS[name].from_arrays(arrays | {"paths": np.array(5)})
    with pytest.raises(DamagedTableError, match="do not fit together"):
        PREDICTORS[name].from_arrays(arrays | {"options": np.frombuffer(b'{"colour": 3}', np.uint8)})


@each_predictor
def test_paths_that_are_always_right_or_always_wrong_are_learnt(gate: Gate, name: str) -> None:
    targets = gate.target.targets.copy()
    targets[:, 1], targets[:, 2] = 0, 1
    errors = gate.select.errors.copy()
    errors[:, 1], errors[:, 2] = False, True
    predictor = make_predictor(name, QUICK.get(name))
    predictor.fit(gate.target.features, targets, validation=(gate.select.features, errors))
    predicted = predictor.predict(gate.test.features)
    assert predicted[:, 1].max() < 0.02
    assert predicted[:, 2].min() > 0.98


@each_predictor
def test_a_single_path_a_single_image_and_constant_features_can_be_fitted(name: str) -> None:
    options = QUICK.get(name, {}) | ({"clusters": 1} if name == "nearest_cluster" else {})
    for features in (np.ones((1, 3)), np.zeros((1, 3))):
        validation = (features, np.ones((1, 1), bool))
        predicted = (
            make_predictor(name, options).fit(features, np.ones((1, 1)), validation=validation).predict(features)
        )
        assert predicted.shape == (1, 1)
        assert predicted[0, 0] >= 0.5


@each_predictor
def test_without_features_the_overall_rates_are_predicted(gate: Gate, name: str) -> None:
    n, m = len(gate.target.errors), len(gate.select.errors)
    validation = (np.zeros((m, 0)), gate.select.errors)
    predictor = make_predictor(name, QUICK.get(name)).fit(np.zeros((n, 0)), gate.target.targets, validation=validation)
    predicted = predictor.predict(np.zeros((3, 0)))
    np.testing.assert_allclose(predicted, np.tile(gate.target.targets.mean(axis=0), (3, 1)), atol=0.05)


@each_predictor
def test_values_that_are_no_numbers_are_named(fitted: Mapping[str, Predictor], gate: Gate, name: str) -> None:
    broken = gate.target.features.copy()
    broken[5, 2] = np.nan
    with pytest.raises(NumericError, match="features: nan at row 5, column 2"):
        fitted[name].predict(broken)
    validation = (gate.select.features, gate.select.errors)
    with pytest.raises(NumericError, match="features: nan at row 5, column 2"):
        make_predictor(name).fit(broken, gate.target.targets, validation=validation)
    seen = (broken, gate.target.errors)
    with pytest.raises(NumericError, match="features: nan at row 5, column 2"):
        make_predictor(name).fit(gate.target.features, gate.target.targets, validation=seen)
    for wrong in (np.nan, 1.5, -0.1):
        targets = gate.target.targets.copy()
        targets[7, 3] = wrong
        with pytest.raises(NumericError, match=f"targets: {wrong} at row 7, path 3"):
            make_predictor(name).fit(gate.target.features, targets, validation=validation)


@each_predictor
def test_shapes_that_disagree_are_told(fitted: Mapping[str, Predictor], gate: Gate, name: str) -> None:
    features, targets = gate.target.features, gate.target.targets
    select = (gate.select.features, gate.select.errors)
    faults = [
        (features, targets[:-1], select, "targets: shape"),
        (features, targets[:, :0], select, "targets: shape"),
        (features[:, 0], targets, select, "features: shape"),
        (features, targets, (select[0][:, :2], select[1]), "features: shape"),
        (features, targets, (select[0], select[1][:, :2]), "validation: errors"),
        (features, targets, (select[0][:0], select[1][:0]), "validation: no rows"),
    ]
    for x, y, validation, told in faults:
        with pytest.raises(ShapeMismatchError, match=told):
            make_predictor(name).fit(x, y, validation=validation)
    with pytest.raises(ShapeMismatchError, match=r"want \[n, 8\]"):
        fitted[name].predict(features[:, :2])


@each_predictor
def test_options_are_checked_against_their_declaration(name: str) -> None:
    with pytest.raises(ConfigError, match=f"predictor {name}: unknown option 'colour'"):
        make_predictor(name, {"colour": 1})
    for option, field in PREDICTORS[name].options_model.model_fields.items():
        assert field.description, option
        with pytest.raises(ConfigError, match=f"predictor {name}: {option}"):
            make_predictor(name, {option: "a word"})


def test_names_that_are_nearly_right_are_suggested() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mlp'"):
        make_predictor("mpl")
    with pytest.raises(ConfigError, match="'learning_rat'; did you mean 'learning_rate'"):
        make_predictor("mlp", {"learning_rat": 0.1})
    with pytest.raises(ConfigError, match=re.escape("predictor mlp: hidden.0: ")):
        make_predictor("mlp", {"hidden": [0]})


@each_predictor
def test_the_number_of_threads_changes_no_bit(torch_threads: Callable[[int], None], gate: Gate, name: str) -> None:
    options = {"mlp": {"epochs": 3, "batch": 512}, "boosted_trees": {"trees": 5}}.get(name)
    select = (gate.select.features, gate.select.errors)
    predictions = []
    for threads in (1, 2):
        torch_threads(threads)
        with threadpool_limits(threads):
            predictor = make_predictor(name, options).fit(gate.target.features, gate.target.targets, validation=select)
            predictions.append(predictor.predict(gate.test.features))
    np.testing.assert_array_equal(*predictions)


def test_the_network_is_fitted_inside_inference_mode_too(fitted: Mapping[str, Predictor], gate: Gate) -> None:
    with torch.inference_mode():
        inside = fit("mlp", gate)
    np.testing.assert_array_equal(inside.predict(gate.test.features), fitted["mlp"].predict(gate.test.features))


def test_the_network_computes_what_its_weights_say(fitted: Mapping[str, Predictor], gate: Gate) -> None:
    mlp = fitted["mlp"]
    assert isinstance(mlp, MLPPredictor)
    rows = mlp.standardizer(gate.test.features)
    (first, second) = mlp.layers
    expected = sigmoid(np.maximum(rows @ first.weight + first.bias, 0) @ second.weight + second.bias)
    np.testing.assert_allclose(mlp.predict(gate.test.features), expected, atol=1e-4)
    assert mlp.macs == 8 + 8 * 64 + 64 * 4


@pytest.mark.parametrize("options", [{}, {"loss": "squared"}, {"hidden": []}, {"hidden": [16, 16]}])
def test_the_network_is_never_worse_on_select_than_where_it_began(gate: Gate, options: dict[str, Any]) -> None:
    noise = np.random.default_rng(0).permutation(gate.target.targets)  # nothing to learn
    for targets in (noise, gate.target.targets):
        mlp = make_predictor("mlp", {"epochs": 8, **options})
        mlp.fit(gate.target.features, targets, validation=(gate.select.features, gate.select.errors))
        began = np.tile(sigmoid(prior_logits(targets)), (len(gate.select.errors), 1))
        score = brier(mlp.predict(gate.select.features), gate.select.errors)
        assert score <= brier(began, gate.select.errors) + 1e-6
    assert score < brier(began, gate.select.errors) - 1e-3


def test_logistic_weights_are_where_the_penalised_cross_entropy_is_flat(gate: Gate) -> None:
    logistic = make_predictor("logistic", {"l2": 0.02})
    targets = np.clip(gate.target.targets, 0.1, 0.7)  # soft ones too
    logistic.fit(gate.target.features, targets, validation=(gate.select.features, gate.select.errors))
    assert isinstance(logistic, LogisticPredictor)
    rows = logistic.standardizer(gate.target.features)
    residual = (logistic.predict(gate.target.features) - targets) / len(rows)
    np.testing.assert_allclose(rows.T @ residual + 0.02 * logistic.linear.weight, 0, atol=1e-5)
    pulled = logistic.linear.bias - prior_logits(targets)
    np.testing.assert_allclose(residual.sum(axis=0) + 0.02 * pulled, 0, atol=1e-5)
    assert logistic.macs == 8 + 8 * 4


@given(seed=SEEDS, depth=st.integers(1, 6), leaf=st.integers(1, 40))
def test_a_tree_in_complete_layout_sends_rows_where_scikit_learn_does(
    gate: Gate, seed: int, depth: int, leaf: int
) -> None:
    features = gate.target.features
    tree = DecisionTreeRegressor(max_depth=depth, min_samples_leaf=leaf, random_state=seed)
    tree.fit(features[:300], gate.target.targets[:300])
    layout = complete_layout(tree, depth, 4)
    ours = leaf_of(layout.feature[0], layout.threshold[0], features.astype(np.float64))
    theirs = tree.apply(features)
    assert len(set(zip(ours.tolist(), theirs.tolist(), strict=True))) == len(set(theirs.tolist())) == len(set(ours))


def test_more_trees_are_kept_only_where_select_gains(gate: Gate) -> None:
    select = (gate.select.features, gate.select.errors)
    trees = make_predictor("boosted_trees", {"trees": 40, "learning_rate": 1.0, "depth": 6, "leaf": 1, "patience": 5})
    trees.fit(gate.target.features, gate.target.targets, validation=select)
    assert isinstance(trees, BoostedTreesPredictor)
    kept = len(trees.forest.leaves)
    assert 0 < kept < 40
    short = make_predictor("boosted_trees", trees.options.model_dump() | {"trees": kept})
    short.fit(gate.target.features, gate.target.targets, validation=select)
    np.testing.assert_array_equal(short.predict(gate.test.features), trees.predict(gate.test.features))
    assert trees.macs == 8 + kept * (6 + 4)


def test_nearest_clusters_are_the_target_table(gate: Gate) -> None:
    nearest = make_predictor("nearest_cluster", {"clusters": 12, "shrinkage": 3.0})
    nearest.fit(
        gate.target.features, gate.target.targets, validation=(gate.select.features, gate.select.errors), seed=4
    )
    clustering = cluster(gate.target.features, 12, seed=4)  # the one that targets of the same K and seed have
    assigned = clustering.assign(gate.target.features)
    for row, c in zip(nearest.predict(gate.test.features), clustering.assign(gate.test.features), strict=True):
        inside = gate.target.targets[assigned == c]
        expected = (inside.sum(axis=0) + 3 * gate.target.targets.mean(axis=0)) / (len(inside) + 3)
        np.testing.assert_allclose(row, expected, rtol=1e-12)
    assert isinstance(nearest, NearestClusterPredictor)
    assert nearest.macs == 8 + 12 * 8


def test_more_clusters_than_images_are_refused(gate: Gate) -> None:
    with pytest.raises(ConfigError, match="5000 is more clusters than images"):
        make_predictor("nearest_cluster", {"clusters": 5000}).fit(
            gate.target.features, gate.target.targets, validation=(gate.select.features, gate.select.errors)
        )


@given(npst.arrays(np.bool_, st.tuples(st.integers(1, 30), st.integers(1, 4))))
def test_starting_log_odds_are_finite_and_nearly_the_rates(errors: NDArray[np.bool_]) -> None:
    logits = prior_logits(errors.astype(float))
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(sigmoid(logits), errors.mean(axis=0), atol=0.5 / len(errors))


@st.composite
def judged(draw: st.DrawFn) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    shape = draw(st.tuples(st.integers(1, 25), st.integers(1, 4)))
    eighths = st.integers(0, 8).map(lambda k: k / 8)
    predicted = draw(npst.arrays(np.float64, shape, elements=st.one_of(st.floats(0, 1), eighths)))
    return predicted, draw(npst.arrays(np.bool_, shape))


@given(judged(), st.integers(1, 20))
def test_qualities_are_what_loops_over_entries_find(
    case: tuple[NDArray[np.float64], NDArray[np.bool_]], k: int
) -> None:
    predicted, errors = case
    pairs = [(float(p), float(e)) for p, e in zip(predicted.flat, errors.flat, strict=True)]
    squared = sum((p - e) ** 2 for p, e in pairs) / len(pairs)
    assert brier(predicted, errors) == pytest.approx(squared, abs=1e-12)
    assert rmse(predicted, errors.astype(float)) == pytest.approx(squared**0.5, abs=1e-12)
    bins = [[pair for pair in pairs if min(int(pair[0] * k), k - 1) == b] for b in range(k)]
    gaps = [abs(sum(p for p, _ in b) - sum(e for _, e in b)) for b in bins]
    assert expected_calibration_error(predicted, errors, bins=k) == pytest.approx(sum(gaps) / len(pairs), abs=1e-12)
    table = reliability_bins(predicted, errors, bins=k)
    assert [b.count for b in table] == [len(b) for b in bins if b]


def test_qualities_of_certain_and_of_indifferent_predictions() -> None:
    errors = np.array([[True, False], [False, False]])
    assert brier(errors.astype(float), errors) == 0
    assert expected_calibration_error(errors.astype(float), errors) == 0
    assert brier(np.full((2, 2), 0.5), errors) == 0.25
    assert expected_calibration_error(np.full((2, 2), 0.5), errors) == 0.25
    (only,) = reliability_bins(np.full((2, 2), 0.5), errors)
    assert (only.predicted, only.observed, only.count) == (0.5, 0.25, 4)


def test_qualities_refuse_what_they_cannot_judge() -> None:
    errors = np.zeros((2, 2), bool)
    with pytest.raises(ShapeMismatchError, match="same shape"):
        brier(np.zeros((2, 3)), errors)
    with pytest.raises(ShapeMismatchError, match="not empty"):
        rmse(np.zeros((0, 2)), np.zeros((0, 2)))
    with pytest.raises(NumericError, match="predicted"):
        expected_calibration_error(np.full((2, 2), np.nan), errors)
    with pytest.raises(ConfigError, match="bins"):
        reliability_bins(np.zeros((2, 2)), errors, bins=0)
