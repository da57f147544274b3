"""Archives: the same contents are the same bytes, and anything else is refused."""

import numpy as np
import pytest

from quee_core.archive import pack, unpack
from quee_core.errors import DamagedTableError

ARRAYS = {"b": np.arange(6).reshape(2, 3), "a": np.array(1.5)}
SETTINGS = {"z": [1, None], "a": {"x": "λ"}}


def test_the_same_contents_give_the_same_bytes() -> None:
    assert len({pack(ARRAYS, SETTINGS, kind="test") for _ in range(50)}) == 1


def test_what_was_packed_is_read_back() -> None:
    arrays, settings = unpack(pack(ARRAYS, SETTINGS, kind="test"), kind="test")
    assert settings == SETTINGS
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].shape == array.shape


@pytest.mark.parametrize("damage", [lambda d: d[:20], lambda _: b"", lambda d: d[:-3], lambda _: b"x" * 100])
def test_damage_is_refused(damage) -> None:
    with pytest.raises(DamagedTableError):
        unpack(damage(pack(ARRAYS, SETTINGS, kind="test")), kind="test")


def test_another_kind_is_refused() -> None:
    with pytest.raises(DamagedTableError, match="other"):
        unpack(pack(ARRAYS, SETTINGS, kind="other"), kind="test")
