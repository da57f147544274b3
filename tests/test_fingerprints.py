"""Fingerprints: equal values share one, different values do not, and a reworded comment changes nothing."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from quee_core.errors import ConfigError
from quee_core.fingerprints import (
    array_fingerprint,
    canonical_json,
    code_version,
    fingerprint,
    library_versions,
    syntax_digest,
)

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)
number_arrays = npst.arrays(
    st.sampled_from([np.float32, np.float64, np.int16, np.bool_]), npst.array_shapes(min_dims=0, max_dims=3, max_side=4)
)

FUNCTION = '''
"""A module."""
import math

LIMIT = 3


class Circle:
    """A circle."""

    radius: float
    """In metres."""

    def area(self) -> float:
        """Its area."""
        # pi r squared
        return math.pi * self.radius**2
'''


def reordered(value: object) -> object:
    """The same value: mappings filled in the other order, tuples for lists."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return tuple(map(reordered, value)) if isinstance(value, list) else value


@given(values)
def test_the_text_of_a_value_reads_back_and_does_not_depend_on_the_order_of_keys(value: object) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(reordered(value)) == text


@given(values, values)
def test_two_values_share_a_fingerprint_just_when_they_share_their_text(one: object, other: object) -> None:
    assert (fingerprint(one) == fingerprint(other)) == (canonical_json(one) == canonical_json(other))
    assert one == other or fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), (0, False), (0.1, "0.1"), (None, "null"), ([], {})])
def test_values_that_python_or_json_might_confuse_are_told_apart(one: object, other: object) -> None:
    assert fingerprint([one]) != fingerprint([other])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [-float("inf")], {"a": {"b": float("nan")}}])
def test_what_is_no_number_has_no_fingerprint(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint(value)


@pytest.mark.parametrize("value", [{8: "a"}, [{"bits": {None: 1}}], {"a": ({1: 2},)}])
def test_keys_that_json_would_turn_into_text_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="keys are not text"):
        fingerprint(value)


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", Path("a"), np.float32(1)])
def test_objects_without_a_canonical_text_are_refused(value: object) -> None:
    with pytest.raises(TypeError):
        fingerprint({"a": value})


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    value = {"größe": [1, 2.5, True, None], "a": {"z": "x", "b": ["\ud800", ""]}}
    script = f"from quee_core.fingerprints import fingerprint; print(fingerprint({value!r}))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == fingerprint(value)


@given(st.dictionaries(st.text(max_size=3), number_arrays, max_size=3))
def test_neither_memory_order_nor_order_of_names_changes_the_fingerprint_of_arrays(
    arrays: dict[str, np.ndarray],
) -> None:
    other = {name: arrays[name].copy(order="F") for name in reversed(arrays)}
    assert array_fingerprint(other) == array_fingerprint(arrays)


@given(number_arrays.filter(lambda array: array.size > 0), st.data())
def test_one_changed_value_changes_the_fingerprint_of_arrays(array: np.ndarray, data: st.DataObject) -> None:
    changed = array.copy()
    position = data.draw(st.integers(0, array.size - 1))
    bits = changed.reshape(-1).view(np.uint8)  # a bit, so that NaN counts too
    bits[position * array.itemsize] ^= 1
    assert array_fingerprint({"a": changed}) != array_fingerprint({"a": array})


def test_name_dtype_and_shape_of_an_array_count() -> None:
    array = np.zeros((2, 3), np.float32)
    others = [{"b": array}, {"a": array.astype(np.int32)}, {"a": array.reshape(3, 2)}, {"a": array, "b": array}, {}]
    assert len({array_fingerprint(arrays) for arrays in ({"a": array}, *others)}) == 6


def test_arrays_of_objects_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="'names'"):
        array_fingerprint({"names": np.array(["a", None], object)})


def test_comments_docstrings_and_layout_leave_the_code_version_alone() -> None:
    source = FUNCTION.replace("pi r squared", "another comment").replace("A module.", "Other words.")
    source = source.replace("In metres.", "In feet.").replace('        """Its area."""\n', "").replace("\n\n\n", "\n")
    assert source != FUNCTION
    assert syntax_digest(source) == syntax_digest(FUNCTION)
    assert syntax_digest(ast.unparse(ast.parse(FUNCTION))) == syntax_digest(FUNCTION)


@pytest.mark.parametrize(
    ("old", "new"), [("**2", "**3"), ("LIMIT = 3", "LIMIT = 4"), ("radius: float", "radius: int"), ("area", "arena")]
)
def test_every_changed_line_changes_the_code_version(old: str, new: str) -> None:
    assert syntax_digest(FUNCTION.replace(old, new)) != syntax_digest(FUNCTION)


def test_a_text_that_is_a_value_counts() -> None:
    assert syntax_digest("def f():\n    return 'a'") != syntax_digest("def f():\n    return 'b'")


def code_version_of(folder: Path, *modules: str) -> str:
    """In a process of its own, as after an edit: a running process has the old code loaded."""
    script = f"from quee_core.fingerprints import code_version; print(code_version({list(modules)!r}))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {script}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_package_stands_for_all_modules_in_it(tmp_path: Path) -> None:
    package = tmp_path / "walking"
    (package / "far").mkdir(parents=True)
    for name in ("__init__.py", "legs.py", "far/__init__.py", "far/shoes.py"):
        (package / name).write_text("SIZE = 1\n")
    before = code_version_of(tmp_path, "walking")
    (package / "far" / "shoes.py").write_text("SIZE = 1  # European\n")
    assert code_version_of(tmp_path, "walking") == before
    legs = code_version_of(tmp_path, "walking.legs")
    (package / "far" / "shoes.py").write_text("SIZE = 2\n")
    assert code_version_of(tmp_path, "walking") != before
    assert code_version_of(tmp_path, "walking.legs") == legs


def test_order_and_repetition_of_modules_do_not_matter_but_their_set_does() -> None:
    import quee_core.paths

    names = ["quee_core.paths", "quee_core.errors"]
    assert code_version(names) == code_version([*reversed(names), "quee_core.paths"])
    assert code_version(names) == code_version([quee_core.paths, "quee_core.errors"])
    assert code_version(names) != code_version(names[:1])


@pytest.mark.parametrize("module", ["quee_core.no_such_module", "math", "no_such_package"])
def test_a_module_without_source_is_named(module: str) -> None:
    with pytest.raises(ConfigError, match=module):
        code_version([module])


def test_versions_name_python_and_what_the_figures_depend_on() -> None:
    versions = library_versions()
    assert versions["python"].startswith("3.")
    assert versions["numpy"] == np.__version__
    assert {"torch", "timm", "scikit-learn", "pyarrow"} <= set(versions)
