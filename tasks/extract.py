"""Extraction: one task fills the cells of one branch of the path tree over one shard of images."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from quee_core.config import SweepConfig
from quee_core.data.splits import SplitName, image_count
from quee_core.errors import QueeError, StoreUnreachableError
from quee_core.stages import Work, cells_of, extract_branch
from tasks.devices import network_to_oneself
from tasks.progress import advance
from tasks.resolved import network_for, plan_of, store_of

STAGE = "extract"
CELLS = "cells"


def is_transient(_task: object, _run: object, state: object) -> bool:
    """Whether another try can help: of quee's own errors, which report bad input, only a store out of reach."""
    error = getattr(state, "data", None)
    fault = getattr(error, "exception", error)
    return isinstance(fault, StoreUnreachableError) or not isinstance(fault, QueeError)


@task(
    task_run_name="extract-{split}-{shard}-first-{first_bits}-bits",
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=is_transient,
    cache_policy=NO_CACHE,  # the store decides; a hash of this wrapper would miss changes in quee_core
    tags=["gpu"],
)
def extract(sweep: SweepConfig, split: SplitName, shard: int, first_bits: int) -> Work:
    """Publish the tables of a branch that the store lacks; a crash loses no finished one."""
    plan, store = plan_of(sweep), store_of(sweep)
    _, exits, calibration = network_for(sweep)
    cells = cells_of(plan, exits, calibration, split, shard, plan.tree.branch(first_bits))
    with network_to_oneself(sweep) as network:
        work = extract_branch(
            plan, store, network, cells, split, shard, on_images=lambda images: advance(STAGE, images)
        )
    if not work.computed:
        advance(STAGE, image_count(plan.shards(split)[shard]))
    advance(CELLS, len(cells))
    return work
