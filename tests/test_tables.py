"""Feature tables: what each column is, that they survive the disk, and that outcomes line up."""

import json
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from quee_core.errors import (
    ConfigError,
    DamagedTableError,
    DataError,
    NumericError,
    QueeError,
    ShapeMismatchError,
    StoreError,
)
from quee_core.paths import ROOT, Path
from quee_core.tables import (
    UNCERTAINTY,
    Cell,
    Outcomes,
    check_table,
    feature_table,
    from_parquet_bytes,
    schema,
    softmax,
    to_parquet_bytes,
)
from tests.feature_tables import PATHS, numbered_cell, small_table

Logits = NDArray[np.float32]


@st.composite
def logit_arrays(draw: st.DrawFn, max_classes: int = 90) -> Logits:
    """Also with ties, which rounding to quarters makes, and with values far apart."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(2, max_classes)))
    scale = draw(st.sampled_from([0.25, 1.0, 30.0]))
    steps = draw(npst.arrays(np.int8, shape, elements=st.integers(-20, 20)))
    return (steps * np.float32(scale)).astype(np.float32)


def table_of(logits: Logits, labels: NDArray[np.int16] | None = None) -> pa.Table:
    n = len(logits)
    labels = np.zeros(n, np.int16) if labels is None else labels
    return feature_table(np.arange(n), labels, logits, np.zeros((n, 1), np.float32))


def column(table: pa.Table, name: str) -> NDArray[Any]:
    return np.array(table[name].to_pylist())


@given(logit_arrays())
def test_uncertainty_is_that_of_the_textbook_one_row_at_a_time(logits: Logits) -> None:
    table = table_of(logits)
    for k, row in enumerate(logits.astype(np.longdouble)):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        squared = p**2 / (p**2).sum()
        falling = np.sort(p)[::-1]
        want = {
            "p_max": falling[0], "margin": falling[0] - falling[1],
            "entropy": -sum(q * np.log(q) for q in p if q > 0),
            "entropy_t2": -sum(q * np.log(q) for q in squared if q > 0),
        }  # fmt: skip
        for name, value in want.items():
            assert table[name][k].as_py() == pytest.approx(float(value), rel=1e-6, abs=1e-7), name
        np.testing.assert_allclose(table["top_p"][k].as_py(), falling[:16].astype(np.float64), rtol=1e-3, atol=1e-7)


@given(logit_arrays())
def test_classes_fall_by_logit_and_equal_ones_keep_their_order(logits: Logits) -> None:
    table = table_of(logits)
    want = [sorted(range(len(row)), key=lambda c, r=row: (-r[c], c))[:16] for row in logits.tolist()]
    assert column(table, "top_class").tolist() == want
    np.testing.assert_array_equal(column(table, "predicted"), logits.argmax(axis=1))


def test_a_logit_too_close_for_its_probability_to_differ_still_decides() -> None:
    assert table_of(np.array([[1e-30, 2e-30]], np.float32))["predicted"].to_pylist() == [1]


@given(logit_arrays(), st.data())
def test_a_row_does_not_depend_on_its_batch(logits: Logits, data: st.DataObject) -> None:
    rows = np.array(data.draw(st.permutations(range(len(logits)))))[: data.draw(st.integers(1, len(logits)))]
    whole, part = table_of(logits), table_of(np.ascontiguousarray(logits[rows]))
    assert part.drop_columns("sample_id").equals(whole.take(rows).drop_columns("sample_id"))


def test_many_rows_are_worked_on_in_pieces_without_a_seam() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (700, 1000)).astype(np.float32)
    whole = table_of(logits)
    pieces = pa.concat_tables([table_of(logits[k : k + 100]) for k in range(0, 700, 100)])
    assert whole.drop_columns("sample_id").equals(pieces.drop_columns("sample_id").combine_chunks())


@given(logit_arrays(max_classes=6), st.data())
def test_correct_says_whether_the_answer_is_the_label(logits: Logits, data: st.DataObject) -> None:
    n, classes = logits.shape
    labels = data.draw(npst.arrays(np.int16, n, elements=st.integers(0, classes - 1)))
    table = table_of(logits, labels)
    np.testing.assert_array_equal(column(table, "correct"), logits.argmax(axis=1) == labels)
    np.testing.assert_array_equal(column(table, "label"), labels)


@given(logit_arrays())
def test_softmax_sums_to_one_and_survives_large_logits(logits: Logits) -> None:
    p = softmax(logits * np.float32(1e4))
    assert p.dtype == np.float32
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-5)


def test_no_images_make_an_empty_table_of_the_same_columns() -> None:
    empty = feature_table(
        np.zeros(0, np.int64), np.zeros(0, np.int16), np.zeros((0, 90), np.float32), np.zeros((0, 4), np.float32)
    )
    assert empty.num_rows == 0
    assert empty.schema == schema(90, 4)
    check_table(from_parquet_bytes(to_parquet_bytes(empty, {})))


def test_embeddings_beyond_half_precision_are_held_at_its_ends() -> None:
    embedding = np.array([[1e6, -1e6, 65504, 1.0]], np.float32)
    table = feature_table(np.zeros(1, np.int64), np.zeros(1, np.int16), np.zeros((1, 2), np.float32), embedding)
    assert table["embedding"].to_pylist() == [[65504, -65504, 65504, 1]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["logits", "embedding"])
def test_values_that_are_no_numbers_name_their_sample(where: str, value: float) -> None:
    arrays = {"logits": np.zeros((3, 4), np.float32), "embedding": np.zeros((3, 2), np.float32)}
    arrays[where][1, 1] = value
    with pytest.raises(NumericError, match=rf"sample_id 8: {where}.*1 of 3"):
        feature_table(np.array([7, 8, 9]), np.zeros(3, np.int16), arrays["logits"], arrays["embedding"])


@pytest.mark.parametrize("label", [-2, 4, 300])
def test_a_label_that_is_no_class_names_its_sample(label: int) -> None:
    with pytest.raises(DataError, match=rf"sample_id 8: label {label}, but there are 4 classes"):
        feature_table(
            np.array([7, 8]), np.array([0, label], np.int16), np.zeros((2, 4), np.float32), np.zeros((2, 1), np.float32)
        )


@pytest.mark.parametrize(
    ("ids", "labels", "logits", "embedding"),
    [(3, 2, (2, 4), (2, 1)), (2, 2, (3, 4), (2, 1)), (2, 2, (2, 4), (1, 1)), (2, 2, (8,), (2, 1)),
     (2, 2, (2, 1), (2, 1)), (2, 2, (2, 4), (2, 0))],
)  # fmt: skip
def test_rows_that_disagree_are_refused(
    ids: int, labels: int, logits: tuple[int, ...], embedding: tuple[int, ...]
) -> None:
    with pytest.raises(ShapeMismatchError, match="want"):
        feature_table(np.arange(ids), np.zeros(labels, np.int16), np.zeros(logits, np.float32), np.zeros(embedding))


@given(st.integers(0, 30), st.integers(2, 40), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=25)
def test_a_table_survives_parquet_bit_for_bit(images: int, classes: int, embedding: int, number: int) -> None:
    table = small_table(number, images=images, classes=classes, embedding=embedding)
    data = to_parquet_bytes(table, {"b": "2", "a": "1"})
    back = from_parquet_bytes(data)
    assert back.equals(table)
    assert back.schema.metadata == {b"a": b"1", b"b": b"2"}
    assert to_parquet_bytes(back, {"a": "1", "b": "2"}) == data


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda t: t.drop_columns("entropy"), "'entropy'.*missing"),
        (lambda t: t.append_column("extra", t["label"]), "extra"),
        (lambda t: t.append_column("label", t["label"]), "'label'.*double"),
        (lambda t: t.set_column(1, "label", t["label"].cast(pa.int32())), "'label' is int32, want int16"),
        (lambda t: t.set_column(8, "top_p", t["p_max"]), "'top_p' is float"),
        (lambda t: t.set_column(4, "p_max", pa.nulls(t.num_rows, pa.float32())), "'p_max' holds nulls"),
        (lambda t: t.select([]), "missing"),
    ],
)
def test_what_is_no_feature_table_is_refused_by_column(spoil: Any, named: str) -> None:
    spoilt = spoil(small_table())
    with pytest.raises(DamagedTableError, match=named):
        check_table(spoilt)
    sink = pa.BufferOutputStream()
    pq.write_table(spoilt, sink)
    with pytest.raises(DamagedTableError):
        from_parquet_bytes(sink.getvalue().to_pybytes())


@pytest.mark.parametrize("data", [b"", b"PAR1", b"not a table at all, whatever its name says"])
def test_bytes_that_are_no_parquet_are_refused(data: bytes) -> None:
    with pytest.raises(DamagedTableError, match="not a Parquet file"):
        from_parquet_bytes(data)


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
cells = st.builds(
    Cell, backbone=names, dataset=names, split=st.sampled_from(["target", "test"]), path=st.sampled_from(PATHS),
    shard=st.integers(0, 3), shards=st.integers(4, 5), key=st.sampled_from([c * 64 for c in "0a"]),
)  # fmt: skip


@given(cells, cells)
def test_two_cells_lie_in_one_place_just_when_they_are_equal(one: Cell, other: Cell) -> None:
    assert (one.location == other.location) == (one == other)


@given(cells)
def test_a_cell_lies_five_folders_deep_whatever_its_names(cell: Cell) -> None:
    *folders, _ = cell.location.split("/")
    assert [folder.split("=")[0] for folder in folders] == ["backbone", "dataset", "split", "exit", "bits"]
    assert cell.location.isascii()


def test_a_cell_is_found_where_the_design_says() -> None:
    cell = Cell("micro_vit", "fashion_mnist", "test", Path((8, 4, 2)), 0, 4, "ab" * 32)
    want = "backbone=micro_vit/dataset=fashion_mnist/split=test/exit=3/bits=8-4-2/part-00000-of-00004-"
    assert cell.location == want + "ab" * 10 + ".parquet"


@pytest.mark.parametrize(
    ("change", "error"),
    [({"backbone": ""}, ConfigError), ({"dataset": "x" * 201}, ConfigError), ({"path": ROOT}, ConfigError),
     ({"shard": 4}, ValueError), ({"shard": -1}, ValueError), ({"key": "../../etc"}, ValueError)],
)  # fmt: skip
def test_impossible_cells(change: dict[str, Any], error: type[Exception]) -> None:
    fields = {"backbone": "b", "dataset": "d", "split": "test", "path": PATHS[0], "shard": 0, "shards": 4}
    with pytest.raises(error):
        Cell(**(fields | {"key": "ab" * 32} | change))


def outcomes(paths: int = 3) -> Outcomes:
    return Outcomes.from_tables([(PATHS[k], small_table(k)) for k in range(paths)])


def test_outcomes_hold_what_the_tables_hold() -> None:
    tables = [(PATHS[k], small_table(k)) for k in range(4)]
    stacked = Outcomes.from_tables(tables)
    assert stacked.paths == PATHS[:4]
    assert stacked.images == 12
    for k, (_, table) in enumerate(tables):
        np.testing.assert_array_equal(stacked.sample_ids, column(table, "sample_id"))
        np.testing.assert_array_equal(stacked.labels, column(table, "label"))
        np.testing.assert_array_equal(stacked.predicted[:, k], column(table, "predicted"))
        np.testing.assert_array_equal(stacked.errors[:, k], ~column(table, "correct"))
        for j, name in enumerate(UNCERTAINTY):
            np.testing.assert_array_equal(stacked.uncertainty[:, k, j], column(table, name).astype(np.float32))
        for name in ("top_p", "top_class", "embedding"):
            np.testing.assert_array_equal(getattr(stacked, name)[:, k], column(table, name))
    dtypes = [a.dtype.name for a in (stacked.sample_ids, stacked.labels, stacked.predicted, stacked.errors)]
    assert dtypes == ["int64", "int16", "int16", "bool"]
    dtypes = [a.dtype.name for a in (stacked.uncertainty, stacked.top_p, stacked.top_class, stacked.embedding)]
    assert dtypes == ["float32", "float16", "int16", "float16"]


def test_outcomes_of_shards_are_those_of_the_whole() -> None:
    whole = small_table(1)
    shards = pa.concat_tables([whole.slice(0, 5), whole.slice(5)])
    joined, single = (Outcomes.from_tables([(PATHS[0], table)]) for table in (shards, whole))
    for name in ("sample_ids", "labels", "predicted", "errors", "uncertainty", "top_p", "top_class", "embedding"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(single, name))


def relabelled(table: pa.Table) -> pa.Table:
    return table.set_column(1, table.schema.field("label"), pa.array([1] * table.num_rows, pa.int16()))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (small_table(1).slice(0, 5), "lists other samples"),
        (small_table(1).take(np.arange(11, -1, -1)), "lists other samples"),
        (relabelled(small_table(1)), "other labels"),
        (small_table(1, embedding=4), "other columns"),
    ],
)
def test_tables_that_do_not_line_up_are_named(other: pa.Table, named: str) -> None:
    with pytest.raises(ShapeMismatchError, match=f"path 4: .*{named}"):
        Outcomes.from_tables([(PATHS[0], small_table(0)), (PATHS[1], other)])


def test_outcomes_need_a_table_and_take_each_path_once() -> None:
    with pytest.raises(ShapeMismatchError, match="at least one path"):
        Outcomes.from_tables([])
    with pytest.raises(ShapeMismatchError, match="twice"):
        Outcomes.from_tables([(PATHS[0], small_table(0)), (PATHS[0], small_table(1))])


def test_a_gate_sees_what_the_table_of_its_path_holds() -> None:
    held = outcomes()
    seen = held.gate_features(PATHS[1], ("uncertainty", "embedding"))
    assert seen.dtype == np.float32
    np.testing.assert_array_equal(seen[:, :4], held.uncertainty[:, 1])
    np.testing.assert_array_equal(seen[:, 4:9], held.top_p[:, 1])
    np.testing.assert_array_equal(seen[:, 9:], held.embedding[:, 1])
    np.testing.assert_array_equal(held.gate_features(PATHS[1], ("embedding",)), seen[:, 9:])
    assert held.gate_features(ROOT, ("uncertainty",)).shape == (12, 0)
    assert held.gate_features(PATHS[1], ()).shape == (12, 0)


def test_gates_and_features_that_are_not_there_are_named() -> None:
    with pytest.raises(ShapeMismatchError, match="gate 8-8"):
        outcomes().gate_features(Path((8, 8)), ("uncertainty",))
    with pytest.raises(ConfigError, match="did you mean 'embedding'"):
        outcomes().gate_features(PATHS[0], ("embeding",))  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 11), max_size=20))
def test_rows_that_are_taken_are_those_rows(rows: list[int]) -> None:
    held, picked = outcomes(), np.array(rows, np.intp)
    taken = held.take(picked)
    assert taken.images == len(rows)
    np.testing.assert_array_equal(taken.sample_ids, held.sample_ids[picked])
    np.testing.assert_array_equal(taken.embedding, held.embedding[picked])


def assert_equal(one: Outcomes, other: Outcomes) -> None:
    assert one.paths == other.paths
    for name in ("sample_ids", "labels", "predicted", "errors", "uncertainty", "top_p", "top_class", "embedding"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("mmap", [True, False])
def test_outcomes_survive_the_disk(tmp_path: FilePath, mmap: bool) -> None:
    held = outcomes()
    held.save(tmp_path / "a" / "b")
    back = Outcomes.load(tmp_path / "a" / "b", mmap=mmap)
    assert_equal(back, held)
    assert isinstance(back.embedding, np.memmap) == mmap


def test_no_rows_survive_the_disk(tmp_path: FilePath) -> None:
    none = outcomes().take(np.zeros(0, np.intp))
    none.save(tmp_path)
    assert_equal(Outcomes.load(tmp_path), none)


def test_saving_again_replaces_the_files_but_not_what_a_reader_has_mapped(tmp_path: FilePath) -> None:
    old, new = outcomes(), outcomes(2)
    old.save(tmp_path)
    mapped = Outcomes.load(tmp_path)
    new.save(tmp_path)
    assert_equal(mapped, old)
    assert_equal(Outcomes.load(tmp_path), new)
    assert not list(tmp_path.glob(".*"))


def test_mapped_outcomes_can_not_be_written_to(tmp_path: FilePath) -> None:
    outcomes().save(tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        Outcomes.load(tmp_path).errors[0, 0] = True


def test_outcomes_that_were_never_finished_are_named(tmp_path: FilePath) -> None:
    outcomes().save(tmp_path)
    (tmp_path / "paths.json").unlink()
    with pytest.raises(StoreError, match=str(tmp_path)):
        Outcomes.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "data"),
    [("labels.npy", b"not an array"), ("labels.npy", None), ("embedding.npy", "short"), ("paths.json", b"{}x"),
     ("paths.json", json.dumps(["8"]).encode()), ("paths.json", b"[8]"), ("paths.json", json.dumps(["9"]).encode())],
)  # fmt: skip
def test_files_that_outcomes_did_not_write_are_refused(tmp_path: FilePath, name: str, data: bytes | str | None) -> None:
    outcomes().save(tmp_path)
    path = tmp_path / name
    if data is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20] if isinstance(data, str) else data)
    with pytest.raises(QueeError, match=str(tmp_path)):
        Outcomes.load(tmp_path)


def test_outcomes_can_not_be_saved_below_a_file(tmp_path: FilePath) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="a file stands where a folder is needed"):
        outcomes().save(tmp_path / "file" / "below")


def test_arrays_that_disagree_make_no_outcomes() -> None:
    held = outcomes()
    with pytest.raises(ShapeMismatchError, match="predicted"):
        Outcomes(
            held.paths, held.sample_ids, held.labels, held.predicted[:, :2], held.errors, held.uncertainty, held.top_p,
            held.top_class, held.embedding,
        )  # fmt: skip


def test_numbered_cells_differ() -> None:
    assert len({numbered_cell(number).location for number in range(50)}) == 50
