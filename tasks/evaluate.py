"""Evaluation: the finished record of a sweep, its router and its report."""

from dataclasses import asdict
from pathlib import Path as FilePath

from prefect import task
from prefect.cache_policies import NO_CACHE

from quee_core.config import SweepConfig
from quee_core.data.datasets import UNLABELLED
from quee_core.deployment import export_winner
from quee_core.evaluation import PricedTree, gate_decisions
from quee_core.gate_costs import gate_bitops, gate_milliseconds
from quee_core.grid import GateFit, GridPoint, grid_points
from quee_core.grid_units import failures_key
from quee_core.kept_evaluation import evaluation_key, find_evaluation, keep_evaluation
from quee_core.plan import WALKED
from quee_core.policy import GatePolicy
from quee_core.record import StageTiming, SweepRecord
from quee_core.report.page import render
from quee_core.revisions import RevisedAnswers
from quee_core.runs import report_path, router_folder, write_record, write_text
from quee_core.shipping import GateFront, choose_rules
from quee_core.stages import costs_of, device_name, stored_floats
from quee_core.summary import choose_winner, summarise
from quee_core.tables import Outcomes
from tasks.assemble import Assembled
from tasks.progress import advance, stage
from tasks.resolved import device_of, network_for, plan_of, store_of
from tasks.retries import PATIENT


@task(task_run_name="evaluate-{sweep.name}", cache_policy=NO_CACHE, tags=["gpu"], **PATIENT)
def evaluate(
    sweep: SweepConfig, assembled: Assembled, fits: list[GateFit], timings: list[StageTiming], folder: FilePath
) -> SweepRecord:
    """The record of a sweep and its router below `folder`; an evaluation of the same outcomes is not repeated."""
    plan, store, device = plan_of(sweep), store_of(sweep), device_of(sweep)
    router = router_folder(folder)
    outcomes = "".join(assembled.keys[split] for split in plan.walked)
    key = evaluation_key(plan, outcomes + failures_key(fits), device_name(device))
    with stage("evaluate", 4, "steps") as work:
        record = find_evaluation(store, key, router)
        if record is None:
            record = _evaluated(sweep, assembled, fits, router)
            keep_evaluation(store, key, record, router)
            work.count(computed=1)
        else:
            advance("evaluate", 4)
            work.count(reused=1)
    return record.model_copy(update={"timings": (*timings, work.timing())})


def _evaluated(sweep: SweepConfig, assembled: Assembled, fits: list[GateFit], router: FilePath) -> SweepRecord:
    """Choose the winner on `select`, measure it and every baseline on `test`, export its router."""
    plan, store, device = plan_of(sweep), store_of(sweep), device_of(sweep)
    network, exits, calibration = network_for(sweep)
    outcomes = {split: Outcomes.load(folder) for split, folder in assembled.folders.items()}
    target, select, test = (outcomes[split] for split in WALKED)
    tables = costs_of(plan, store, network, exits, device)
    priced = PricedTree.of(tables[sweep.cost.unit == "milliseconds"], plan.tree)
    advance("evaluate", 1)

    def bitops(policy: GatePolicy) -> tuple[float, ...]:
        return gate_bitops(policy, projection_macs=exits.projection_macs)

    def milliseconds(point: GridPoint, policy: GatePolicy) -> tuple[float, ...]:
        return stored_floats(
            store,
            "gate-milliseconds",
            [
                assembled.fitted_on, asdict(point), sweep.seed, device_name(device), sweep.cost.batch,
                sweep.cost.repeats,
            ],
            lambda: gate_milliseconds(policy, network, select, batch=sweep.cost.batch, repeats=sweep.cost.repeats),
        )  # fmt: skip

    def gate_costs(point: GridPoint, policy: GatePolicy) -> tuple[float, ...]:
        return bitops(policy) if sweep.cost.unit == "bitops" else milliseconds(point, policy)

    winner = choose_winner(grid_points(sweep), fits, priced, select, sweep.prices.grid(), gate_costs)
    advance("evaluate", 1)
    gates = (bitops(winner.policy), milliseconds(winner.point, winner.policy))
    prices = sweep.prices.grid()
    on_select = GateFront(gate_decisions(winner.policy, winner.costs, prices, select), winner.costs)
    unlabelled = outcomes.get(UNLABELLED)
    revised = RevisedAnswers.of(
        priced.table, target, select, unlabelled, len(plan.dataset.description.classes), sweep.seed,
        projection_macs=exits.projection_macs,
    )  # fmt: skip
    shipped = choose_rules(
        priced.table,
        plan.tree,
        target,
        select,
        on_select,
        prices,
        sweep.seed,
        unlabelled=unlabelled,
        revised=revised,
    )
    revisions = None if revised is None else revised.revisions
    advance("evaluate", 1)
    record = summarise(
        plan, exits, tables, winner, gates, shipped, revisions, priced, (target, select, test), device_name(device)
    )
    export_winner(plan, calibration, exits, winner, priced.table, shipped, revisions, record, router)
    advance("evaluate", 1)
    return record


@task(task_run_name="report-{record.name}", cache_policy=NO_CACHE)
def write_report(record: SweepRecord, folder: FilePath) -> FilePath:
    """Write the record and its report page into the run's folder; returns the page."""
    write_record(record, folder)
    write_text(report_path(folder), render(record))
    return report_path(folder)
