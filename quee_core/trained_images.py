"""Which images of a data set a backbone's weights have learnt from: a note that `quee finetune` leaves in them."""

import logging
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quee_core.backbones.checkpoints import read_note
from quee_core.data.datasets import ImageDataset
from quee_core.data.splits import Selection, hash_uniform, trained_parts
from quee_core.errors import CheckpointError

NOTE = "quee.trained_on"  # name of the note in a safetensors file
PROBES = 16  # images that tell one set of a name from another
PROBE_SALT = 5_000_000  # the seed of the hash that draws them
KNOWN = 0.5  # share of them that must be there: others may have been taken out since

logger = logging.getLogger(__name__)


class Presence(Enum):
    """How the images that weights have learnt from lie in a data set."""

    WHOLE = "under their ids"
    IN_PART = "some under their ids, as they were"
    ABSENT = "none under its id, as it was"


class TrainedImages(BaseModel):
    """What weights have seen of the data set `name`, in the words of a sweep's section `dataset`.

    probes: ids of some of those images, and the `content_digest` of each, hex.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    trained_on: Literal["train", "share"]
    trained_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    trained_seed: Annotated[int, Field(ge=0)] = 0
    probes: tuple[tuple[int, str], ...]

    @model_validator(mode="after")
    def _share_is_given(self) -> "TrainedImages":
        if (self.trained_on == "share") != (self.trained_share is not None):
            raise ValueError("trained_on share and trained_share belong together")
        return self

    @property
    def settings(self) -> dict[str, str | float | int]:
        """Fields of a sweep's `dataset` that say the same."""
        if self.trained_share is None:
            return {"trained_on": self.trained_on}
        return {
            "trained_on": self.trained_on, "trained_share": self.trained_share, "trained_seed": self.trained_seed,
        }  # fmt: skip

    def look_in(self, dataset: ImageDataset, *, contents: bool = True) -> Presence:
        """Whole if `dataset` is the set that was learnt from: its parts for training hold the images by their ids.

        Another set of the same name is not, nor one with some of the images under other ids: to know that, all images
        are read as soon as one of the probes is missed. contents: whether images that have been encoded anew are others
        as well. Raises DataError for an image that cannot be read.
        """
        digests = self._found_in(dataset)
        same = {sample_id for sample_id, digest in self.probes if digests.get(sample_id) == digest}
        otherwise = Presence.IN_PART if same else Presence.ABSENT
        if len(same if contents else digests) < KNOWN * len(self.probes):
            return otherwise
        missed = {digest for sample_id, digest in self.probes if sample_id not in same}
        if missed:
            logger.warning(
                "%d of %d images that the weights have learnt from are not here as they were; reading all images, to "
                "see whether they lie under other names", len(missed), len(self.probes),
            )  # fmt: skip
        return otherwise if missed and _hold(dataset, missed) else Presence.WHOLE

    def _found_in(self, dataset: ImageDataset) -> dict[int, str]:
        """`content_digest`, hex, of the images in the parts for training that have the ids of probes."""
        wanted = [sample_id for sample_id, _ in self.probes]
        found = {}
        for part in trained_parts(dataset.description)[0]:
            ids = dataset.sample_ids(part)
            for position in np.flatnonzero(np.isin(ids, wanted)).tolist():
                found[int(ids[position])] = dataset.content_digest(part, position).hexdigest()
        return found

    def reappear_in(self, dataset: ImageDataset) -> bool:
        """Whether the set holds one of the images, whatever its id; reads all of them. Raises DataError."""
        return _hold(dataset, {digest for _, digest in self.probes})


def probes_of(dataset: ImageDataset, learnt: tuple[Selection, ...]) -> tuple[tuple[int, str], ...]:
    """`PROBES` of the images, drawn by a hash of their ids, as `TrainedImages` keeps them. Raises DataError."""
    drawn: list[tuple[float, int, str, int]] = []
    for s in learnt:
        ids = dataset.sample_ids(s.part)[s.positions]
        at = hash_uniform(ids, PROBE_SALT)
        drawn += [(float(at[k]), int(ids[k]), s.part, int(s.positions[k])) for k in np.argsort(at)[:PROBES]]
    return tuple(
        (sample_id, dataset.content_digest(part, position).hexdigest())
        for _, sample_id, part, position in sorted(drawn)[:PROBES]
    )


def read_trained_images(checkpoint: Path | None) -> TrainedImages | None:
    """What weights say that they have learnt from; None if they say nothing, or are no file of safetensors.

    Raises CheckpointError for a note that quee did not write.
    """
    said = None if checkpoint is None else read_note(checkpoint, NOTE)
    if said is None:
        return None
    try:
        return TrainedImages.model_validate_json(said)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise CheckpointError(
            f"{checkpoint}: its note {NOTE} is none that this version of quee writes ({where}: {first['msg']}); "
            "fine-tune again, or save the weights without it and set dataset.trained_on"
        ) from None


def _hold(dataset: ImageDataset, digests: set[str]) -> bool:
    return any(
        dataset.content_digest(part, position).hexdigest() in digests
        for part in dataset.description.parts
        for position in range(len(dataset.sample_ids(part)))
    )
