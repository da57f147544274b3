"""Extraction: one task fills the cells of one branch of the path tree over one shard of images."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from quee_core.config import SweepConfig
from quee_core.data.splits import SplitName, image_count
from quee_core.stages import Work, cells_of, extract_branch
from tasks.devices import network_to_oneself
from tasks.progress import advance
from tasks.resolved import network_for, plan_of, store_of
from tasks.retries import PATIENT

STAGE = "extract"
CELLS = "cells"


@task(
    task_run_name="extract-{split}-{shard}-first-{first_bits}-bits",
    cache_policy=NO_CACHE,  # the store decides; a hash of this wrapper would miss changes in quee_core
    tags=["gpu"],
    **PATIENT,
)
def extract(sweep: SweepConfig, split: SplitName, shard: int, first_bits: int) -> Work:
    """Publish the tables of a branch that the store lacks; a crash loses no finished one."""
    plan, store = plan_of(sweep), store_of(sweep)
    _, exits, calibration = network_for(sweep)
    cells = cells_of(plan, exits, calibration, split, shard, plan.tree.branch(first_bits))
    done = 0

    def seen(images: int) -> None:
        nonlocal done
        done += images
        advance(STAGE, images)

    try:
        with network_to_oneself(sweep) as network:
            work = extract_branch(plan, store, network, cells, split, shard, on_images=seen)
    except Exception:
        advance(STAGE, -done)  # another try begins at the first image
        raise
    if not work.computed:
        advance(STAGE, image_count(plan.shards(split)[shard]))
    advance(CELLS, len(cells))
    return work
