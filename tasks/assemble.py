"""Assembly: the tables of all paths as arrays on disk, which every later stage maps."""

from dataclasses import dataclass
from pathlib import Path as FilePath

from prefect import task
from prefect.cache_policies import NO_CACHE

from quee_core.config import SweepConfig
from quee_core.data.splits import SplitName
from quee_core.record import StageTiming
from quee_core.runs import remove_other_folders
from quee_core.shared_outcomes import publish_cells
from quee_core.stages import outcomes_of, split_cells
from quee_core.tables import is_saved
from tasks.progress import advance, stage
from tasks.resolved import network_for, plan_of, store_of
from tasks.retries import PATIENT

FITTED_ON: tuple[SplitName, ...] = ("target", "select")


@dataclass(frozen=True)
class Assembled:
    """Folders of the outcomes, and their fingerprints, by split."""

    folders: dict[SplitName, FilePath]
    keys: dict[SplitName, str]

    @property
    def fitted_on(self) -> str:
        """Fingerprint of what predictors are fitted and chosen on."""
        return "".join(self.keys[split] for split in FITTED_ON)


@task(task_run_name="assemble-{sweep.name}", cache_policy=NO_CACHE, **PATIENT)
def assemble_outcomes(sweep: SweepConfig, folder: FilePath) -> tuple[Assembled, StageTiming]:
    """Read each split's tables into memory-mapped arrays below `folder`; those of other tables are removed."""
    plan, store = plan_of(sweep), store_of(sweep)
    _, exits, calibration = network_for(sweep)
    folders: dict[SplitName, FilePath] = {}
    keys: dict[SplitName, str] = {}
    with stage("assemble tables", len(plan.walked), "splits") as work:
        for split in plan.walked:
            outcomes, keys[split] = outcomes_of(plan, store, exits, calibration, split)
            folders[split] = folder.resolve() / f"{split}-{keys[split]}"
            if is_saved(folders[split]):
                work.count(reused=1)
            else:
                outcomes.save(folders[split])
                work.count(computed=1)
            advance("assemble tables", 1)
        remove_other_folders(folder.resolve(), folders.values())
    if sweep.run.dask is not None:  # workers elsewhere read the tables themselves
        for split in FITTED_ON:
            publish_cells(store, keys[split], split_cells(plan, exits, calibration, split))
    return Assembled(folders, keys), work.timing()
