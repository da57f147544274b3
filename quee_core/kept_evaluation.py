"""A finished evaluation in the store: a rerun of the same sweep finds it, and computes no front again."""

import json
from pathlib import Path as FilePath

from pydantic import ValidationError

from quee_core.deployment import router_digest
from quee_core.errors import DamagedTableError
from quee_core.fingerprints import code_version, environment_versions, fingerprint, library_versions
from quee_core.plan import SweepPlan
from quee_core.record import SweepRecord
from quee_core.store import Store

KIND = "evaluation"


def evaluation_key(plan: SweepPlan, outcomes_key: str, device: str) -> str:
    """Fingerprint of all that a record depends on: outcomes of all splits, the configuration, all of the core's code.

    device: what costs were measured on, as `stages.device_name` gives it. Where things are stored and how many work
    on them, the section `run`, does not matter.
    """
    config = plan.config.model_dump(mode="json", exclude={"run"})
    versions = library_versions()
    fitted_by = [versions[name] for name in ("numpy", "scipy", "scikit-learn")]
    return fingerprint([outcomes_key, config, device, code_version(("quee_core",)), environment_versions(), fitted_by])


def find_evaluation(store: Store, key: str, router: FilePath) -> SweepRecord | None:
    """The record that `keep_evaluation` put there, if the router exported with it still lies whole at `router`.

    Raises DamagedTableError for an entry that is something else.
    """
    data = store.get_artefact(KIND, key)
    if data is None:
        return None
    try:
        kept = json.loads(data)
        record = SweepRecord.model_validate(kept["record"])
        exported = str(kept["router"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise DamagedTableError(f"evaluation {key[:16]}: not one that quee wrote: {error}") from None
    return record if exported == router_digest(router) else None


def keep_evaluation(store: Store, key: str, record: SweepRecord, router: FilePath) -> None:
    """Put `record` into the store, with the checksum of the router at `router`. Raises StoreError for a full disk."""
    kept = {"record": record.model_dump(mode="json"), "router": router_digest(router)}
    store.put_artefact(KIND, key, json.dumps(kept, sort_keys=True).encode())
