"""What QuEE is compared with, on the same tables, images and costs (design, section 10).

Each baseline is a function of `BaselineData` and a price grid; it chooses its settings on `select`, which holds the
images of `target` too, and gives its decisions on `select` and on `test`. Those that learn are fitted there as well.
To add one, write it in a file of its own, name it in `config.BaselineName`, and enter it in `BASELINES`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from quee_core.baselines.boosted import boosted_exits
from quee_core.baselines.data import BaselineData, PolicyPair
from quee_core.baselines.eefp import failure_prediction_exits
from quee_core.baselines.eenet import budgeted_exits
from quee_core.baselines.jei_dnn import jei_dnn_exits
from quee_core.baselines.l2w import weighted_heads
from quee_core.baselines.maqee import risk_controlled_exits
from quee_core.baselines.oracle import label_oracle
from quee_core.baselines.random_exit import random_exits
from quee_core.baselines.static import static_paths
from quee_core.baselines.threshold import threshold_exits
from quee_core.config import BaselineName

Baseline = Callable[[BaselineData, NDArray[np.float64]], PolicyPair]

_BASELINES: dict[BaselineName, Baseline] = {
    "static": static_paths,
    "threshold": threshold_exits,
    "random": random_exits,
    "jei-dnn": jei_dnn_exits,
    "boosted": boosted_exits,
    "l2w-style": weighted_heads,
    "maqee-style": risk_controlled_exits,
    "eenet-style": budgeted_exits,
    "eefp": failure_prediction_exits,
    "oracle": label_oracle,
}
BASELINES: Mapping[BaselineName, Baseline] = MappingProxyType(_BASELINES)

__all__ = ["BASELINES", "Baseline", "BaselineData", "PolicyPair"]
