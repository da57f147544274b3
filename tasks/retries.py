"""Which faults of a task another try can mend, and how often and when it is tried: one policy for every stage."""

import logging
from typing import Any

from prefect.tasks import exponential_backoff

from quee_core.errors import QueeError

logger = logging.getLogger("quee.retries")


def is_transient(task: Any, _run: object, state: object) -> bool:
    """Whether another try can help: for those of quee's faults that pass, and lost connections; no bug, no bad input.

    Says so in the log, where Prefect's own word of it is not shown.
    """
    error = getattr(state, "data", None)
    fault = getattr(error, "exception", error)
    if not (fault.passes if isinstance(fault, QueeError) else isinstance(fault, ConnectionError | TimeoutError)):
        return False
    logger.warning("%s is tried again: %s", getattr(task, "name", "a task"), str(fault).partition("; ")[0])
    return True


# beside the patience of store, scheduler and MLflow's client, each of which waits at every try; those that lost the
# same server do not come back all at once
PATIENT: dict[str, Any] = {
    "retries": 2, "retry_delay_seconds": exponential_backoff(5), "retry_jitter_factor": 0.5,
    "retry_condition_fn": is_transient,
}  # fmt: skip
