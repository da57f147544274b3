"""The model registry: one registered model for each data set, its versions, and the champion among them.

Who was champion when is kept in a tag of the registered model, for the alias has no history of its own. The alias is
what counts: entries that it does not bear out (a process killed in between, a hand in the UI) are passed over.
"""

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.tracking import MlflowClient

from quee_core.errors import ConfigError, did_you_mean

CHAMPION = "champion"
PREFIX = "quee-router-"
OWN_TAG, OWN = "quee", "router"
HISTORY_TAG = "quee.champions"
HISTORY = 50  # entries
PROMOTED_TAG = "quee.promoted"
_BEFORE = "; before it "  # in that tag, what it took the place of
_ABSENT = {ErrorCode.Name(code) for code in (RESOURCE_DOES_NOT_EXIST, INVALID_PARAMETER_VALUE)}


@dataclass(frozen=True)
class Reign:
    """A version's time as champion: since when (ISO 8601, UTC; None if nobody noted it), and how it came to it."""

    version: str
    since: str | None
    how: str


@dataclass(frozen=True)
class Champion:
    """The version in service of a data set, and its tags."""

    dataset: str
    model: str
    version: str
    since: str | None
    how: str
    run_id: str | None
    tags: Mapping[str, str]

    @property
    def backbone(self) -> str:
        """Name of the backbone."""
        return self.tags.get("quee.backbone", "unknown")

    @property
    def run(self) -> str:
        """Name of the sweep."""
        return self.tags.get("quee.run", "unknown")

    @property
    def front(self) -> str:
        """Summary of the front."""
        return self.tags.get("quee.front", "unknown")


class RouterRegistry:
    """Registered routers at one MLflow; every method raises MlflowException if that fails."""

    def __init__(self, client: MlflowClient) -> None:
        self.client = client

    def ensure(self, dataset: str) -> RegisteredModel:
        """The registered model of a data set, made if there is none. Raises ConfigError if it is not quee's."""
        name = PREFIX + dataset
        if self._get(name) is None:
            try:
                self.client.create_registered_model(
                    name, tags={OWN_TAG: OWN}, description=f"Routers for {dataset}, made by quee."
                )
            except MlflowException:
                if self._get(name) is None:  # else another process made it first
                    raise
        return self.model(dataset)

    def model(self, dataset: str) -> RegisteredModel:
        """The registered model of a data set. Raises ConfigError if there is none, or it is not quee's."""
        found = self._get(PREFIX + dataset)
        if found is None:
            known = self.datasets()
            hint = did_you_mean(dataset, known) if known else "no router is registered; `quee sweep` does it"
            raise ConfigError(f"data set {dataset!r}: no registered model {PREFIX}{dataset}; {hint}")
        if found.tags.get(OWN_TAG) != OWN:
            raise ConfigError(
                f"registered model {found.name}: not quee's (its tag {OWN_TAG} is not {OWN!r}); rename that model"
            )
        return found

    def datasets(self) -> list[str]:
        """Names of all data sets that routers are registered for."""
        found = self.client.search_registered_models(f"name LIKE '{PREFIX}%'", max_results=1000)
        return sorted(model.name.removeprefix(PREFIX) for model in found if model.tags.get(OWN_TAG) == OWN)

    def version(self, dataset: str, version: int) -> ModelVersion:
        """One version. Raises ConfigError that lists what there is if it is not there, or was not made by quee."""
        model = self.model(dataset)
        versions = {int(each.version): each for each in self.versions(model.name)}
        if version not in versions:
            have = ", ".join(map(str, sorted(versions))) or "none"
            raise ConfigError(f"{model.name}: no version {version}; it has {have}")
        if "quee.record" not in versions[version].tags:
            raise ConfigError(f"{model.name}: version {version} was not registered by quee; it can't be promoted")
        return versions[version]

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of a registered model."""
        found: list[ModelVersion] = []
        token: str | None = None
        while True:
            page = self.client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
            found += page
            if not (token := page.token):
                return found

    def champion(self, dataset: str) -> Champion | None:
        """The version in service, None if there is none."""
        model = self.model(dataset)
        reigns = history(model)
        if not reigns:
            return None
        now = reigns[-1]
        version = self.client.get_model_version(model.name, now.version)
        return Champion(dataset, model.name, now.version, now.since, now.how, version.run_id, dict(version.tags))

    def rivals(self, dataset: str, number: str) -> list[str]:
        """Versions that were put in the place of the same champion as version `number`, since that was registered."""
        versions = {str(each.version): each for each in self.versions(PREFIX + dataset)}
        told = {each: v.tags[PROMOTED_TAG] for each, v in versions.items() if PROMOTED_TAG in v.tags}
        if number not in told:
            return []
        place = told[number].rpartition(_BEFORE)[2]
        registered = _told(datetime.datetime.fromtimestamp(versions[number].creation_timestamp / 1000, datetime.UTC))
        return [
            each
            for each, how in told.items()
            if each != number and how.rpartition(_BEFORE)[2] == place and how.partition(": ")[0] >= registered
        ]

    def promote(self, dataset: str, version: str, how: str, standing: str | None = None) -> bool:
        """Put a version in service, and note it and what was there before; whether it was done.

        standing: what `standing_of` the champion must still be. Between this look and the move, some milliseconds,
        MLflow holds nobody off.
        """
        model = self.model(dataset)
        reigns = history(model)
        if standing not in (None, standing_of(reigns[-1] if reigns else None)):
            return False
        self._move(model, version, how, reigns)
        return True

    def roll_back(self, dataset: str) -> Reign:
        """Put the champion before this one back in service; returns it.

        Raises ConfigError if there was none, or it has been deleted.
        """
        model = self.model(dataset)
        reigns = history(model)
        if len(reigns) < 2:
            raise ConfigError(f"{model.name}: no champion before the present one; name a version with `promote`")
        before, now = reigns[-2], reigns[-1]
        try:
            self.client.get_model_version(model.name, before.version)
        except MlflowException as error:
            if error.error_code not in _ABSENT:
                raise
            raise ConfigError(
                f"{model.name}: version {before.version}, the champion before, is gone; name one with `promote`"
            ) from None
        return self._move(model, before.version, f"rollback from version {now.version}", reigns[:-2])

    def _move(self, model: RegisteredModel, version: str, how: str, before: list[Reign]) -> Reign:
        reign = Reign(version, _told(datetime.datetime.now(datetime.UTC)), how)
        told = "none" if CHAMPION not in model.aliases else f"version {model.aliases[CHAMPION]}"
        kept = [asdict(each) for each in [*before, reign][-HISTORY:]]
        self.client.set_model_version_tag(model.name, version, PROMOTED_TAG, f"{reign.since}: {how}{_BEFORE}{told}")
        self.client.set_registered_model_tag(model.name, HISTORY_TAG, json.dumps(kept))
        self.client.set_registered_model_alias(model.name, CHAMPION, version)
        return reign

    def _get(self, name: str) -> RegisteredModel | None:
        try:
            return self.client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            return None


def history(model: RegisteredModel) -> list[Reign]:
    """Champions of a registered model, the present one last; empty if there is none."""
    if (present := model.aliases.get(CHAMPION)) is None:
        return []
    present = str(present)
    try:
        reigns = [Reign(str(each["version"]), each["since"], str(each["how"])) for each in _noted(model)]
    except (ValueError, KeyError, TypeError):
        reigns = []
    while reigns and reigns[-1].version != present:
        if all(reign.version != present for reign in reigns):
            return [*reigns, Reign(present, None, "alias set by hand")]
        reigns.pop()
    return reigns or [Reign(present, None, "alias set by hand")]


def standing_of(champion: Champion | Reign | None) -> str:
    """Which version is in service since when, in words that are others after each change."""
    return "none" if champion is None else f"version {champion.version} since {champion.since}"


def _noted(model: RegisteredModel) -> Any:
    return json.loads(model.tags.get(HISTORY_TAG, "[]"))


def _told(when: datetime.datetime) -> str:
    return when.isoformat(timespec="seconds")
