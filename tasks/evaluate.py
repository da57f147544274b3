"""Evaluation: the outcome tables as arrays on disk, and the finished record of a sweep."""

from dataclasses import asdict
from pathlib import Path as FilePath

from prefect import task
from prefect.cache_policies import NO_CACHE

from quee_core.config import SweepConfig
from quee_core.deployment import export_winner
from quee_core.evaluation import PricedTree
from quee_core.gate_costs import gate_bitops, gate_milliseconds
from quee_core.grid import GateFit, GridPoint, grid_points
from quee_core.plan import WALKED
from quee_core.policy import GatePolicy
from quee_core.record import StageTiming, SweepRecord
from quee_core.report.page import render
from quee_core.runs import report_path, router_folder, write_record, write_text
from quee_core.stages import costs_of, device_name, outcomes_of, stored_floats
from quee_core.summary import choose_winner, summarise
from quee_core.tables import Outcomes
from tasks.progress import advance, stage
from tasks.resolved import device_of, network_for, plan_of, store_of


@task(task_run_name="assemble-{sweep.name}", cache_policy=NO_CACHE)
def assemble_outcomes(sweep: SweepConfig, folder: FilePath) -> tuple[dict[str, FilePath], str, StageTiming]:
    """Read each split's tables into memory-mapped arrays below `folder`; also the fingerprint of target and select."""
    plan, store = plan_of(sweep), store_of(sweep)
    _, exits, calibration = network_for(sweep)
    folders, keys = {}, {}
    with stage("assemble tables", len(WALKED), "splits") as work:
        for split in WALKED:
            outcomes, keys[split] = outcomes_of(plan, store, exits, calibration, split)
            folders[split] = folder / f"{split}-{keys[split][:16]}"
            if not (folders[split] / "paths.json").exists():
                outcomes.save(folders[split])
            work.count(computed=1)
            advance("assemble tables", 1)
    return folders, keys["target"] + keys["select"], work.timing()


@task(task_run_name="evaluate-{sweep.name}", cache_policy=NO_CACHE)
def evaluate(
    sweep: SweepConfig,
    folders: dict[str, FilePath],
    fits: list[GateFit],
    key: str,
    timings: list[StageTiming],
    folder: FilePath,
) -> SweepRecord:
    """Choose the winner on `select`, measure it and every baseline on `test`, export its router below `folder`."""
    plan, store, device = plan_of(sweep), store_of(sweep), device_of(sweep)
    network, exits, calibration = network_for(sweep)
    target, select, test = (Outcomes.load(folders[split]) for split in WALKED)
    with stage("evaluate", 3, "steps") as work:
        tables = costs_of(plan, store, network, exits, device)
        priced = PricedTree.of(tables[sweep.cost.unit == "milliseconds"], plan.tree)
        advance("evaluate", 1)

        def bitops(policy: GatePolicy) -> tuple[float, ...]:
            return gate_bitops(policy, projection_macs=exits.projection_macs)

        def milliseconds(point: GridPoint, policy: GatePolicy) -> tuple[float, ...]:
            return stored_floats(
                store,
                "gate-milliseconds",
                [key, asdict(point), sweep.seed, device_name(device), sweep.cost.batch, sweep.cost.repeats],
                lambda: gate_milliseconds(policy, network, select, batch=sweep.cost.batch, repeats=sweep.cost.repeats),
            )

        def gate_costs(point: GridPoint, policy: GatePolicy) -> tuple[float, ...]:
            return bitops(policy) if sweep.cost.unit == "bitops" else milliseconds(point, policy)

        winner = choose_winner(grid_points(sweep), fits, priced, select, sweep.prices.grid(), gate_costs)
        advance("evaluate", 1)
        gates = (bitops(winner.policy), milliseconds(winner.point, winner.policy))
        record = summarise(
            plan, exits, tables, winner, gates, priced, (target, select, test), timings, device_name(device)
        )
        export_winner(plan, calibration, exits, winner, record, router_folder(folder))
        work.count(computed=1)
        advance("evaluate", 1)
    return record.model_copy(update={"timings": (*record.timings, work.timing())})


@task(task_run_name="report-{record.name}", cache_policy=NO_CACHE)
def write_report(record: SweepRecord, folder: FilePath) -> FilePath:
    """Write the record and its report page into the run's folder; returns the page."""
    write_record(record, folder)
    write_text(report_path(folder), render(record))
    return report_path(folder)
