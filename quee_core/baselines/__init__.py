"""What QuEE is compared with, on the same tables, images and costs (design, section 10).

Each baseline is a function of `BaselineData` and a price grid; it chooses its settings on `select`, which holds the
images of `target` too, and gives its decisions on `select` and on `test`. To add one, write it in a file of its own and
enter it in `BASELINES`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from quee_core.baselines.data import BaselineData, PolicyPair
from quee_core.baselines.oracle import label_oracle
from quee_core.baselines.random_exit import random_exits
from quee_core.baselines.static import static_paths
from quee_core.baselines.threshold import threshold_exits

Baseline = Callable[[BaselineData, NDArray[np.float64]], PolicyPair]

_BASELINES: dict[str, Baseline] = {
    "static": static_paths,
    "threshold": threshold_exits,
    "random": random_exits,
    "oracle": label_oracle,
}
BASELINES: Mapping[str, Baseline] = MappingProxyType(_BASELINES)

__all__ = ["BASELINES", "Baseline", "BaselineData", "PolicyPair"]
