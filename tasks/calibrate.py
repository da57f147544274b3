"""Calibration and exits: what must be fitted before any table can be filled."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from quee_core.config import SweepConfig
from quee_core.data.splits import image_count
from quee_core.record import StageTiming
from quee_core.stages import calibration_of, exits_of
from tasks.progress import advance, stage
from tasks.resolved import device_of, plan_of, store_of
from tasks.retries import PATIENT


@task(task_run_name="calibrate-{sweep.backbone.name}", cache_policy=NO_CACHE, tags=["gpu"], **PATIENT)
def calibrate(sweep: SweepConfig) -> StageTiming:
    """Put the backbone's calibration into the store, unless it is there."""
    plan = plan_of(sweep)
    with stage("calibrate", sweep.quantization.images, "images") as work:
        _, done = calibration_of(plan, store_of(sweep), device_of(sweep))
        work.count(computed=done.computed, reused=done.reused, images=done.computed * sweep.quantization.images)
    return work.timing()


@task(task_run_name="train-heads-{sweep.backbone.name}", cache_policy=NO_CACHE, tags=["gpu"], **PATIENT)
def train_heads(sweep: SweepConfig) -> StageTiming:
    """Put exit heads and embeddings, fitted on `fit`, into the store, unless they are there."""
    plan, store, device = plan_of(sweep), store_of(sweep), device_of(sweep)

    def seen(batch: int) -> None:
        work.count(images=batch)
        advance("train heads", batch)

    with stage("train heads", image_count(plan.head_images()), "images") as work:
        calibration, _ = calibration_of(plan, store, device)
        _, done = exits_of(plan, store, calibration, device, on_images=seen)
        work.count(computed=done.computed, reused=done.reused)
    return work.timing()
