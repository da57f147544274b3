"""A shelf: the folder or bucket that trained weights are dropped into, and what there is to sweep on it.

A file `NAME.safetensors` (or `.pth`, `.pt`, `.bin`) holds weights of the backbone NAME, as `list_backbones` knows it;
`NAME__anything.safetensors` further weights of it. A `NAME__anything.yaml` beside it may say what the name does not:
`name`, `num_classes`, `image_size` and `exits`, as in a sweep's section `backbone`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import yaml
from pydantic import ValidationError

from quee_core.config import BackboneConfig
from quee_core.errors import BackboneError, first_misfit
from quee_core.fingerprints import fingerprint
from quee_core.places import Place, open_place

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")
DESCRIPTION = ".yaml"
VARIANT = "__"  # stands between a backbone's name and what tells its weights from others'


@dataclass(frozen=True)
class Shelved:
    """Weights on a shelf.

    label: the file's name without its ending, which names the sweep. backbone: what a sweep of it says of the backbone,
    its checkpoint included. version: fingerprint of what it says and of which bytes these are, as far as the file
    system tells without reading them (time and size, or an S3 object's tag): another one after each change.
    """

    label: str
    backbone: BackboneConfig
    version: str


def read_shelf(url: str) -> tuple[list[Shelved], list[str]]:
    """What lies on the shelf at a folder or `s3://` prefix, by label, and what is wrong with the rest, a line each.

    A description that cannot be used keeps its weights back, and no other's. Raises BackboneError if there is no shelf,
    or two files have one label; StoreError if it cannot be read.
    """
    place = open_place(url, what="folder of backbones")
    files = place.attempt("", "read", place.versions)
    if files is None:
        raise BackboneError(f"{url}: no such folder of backbones; make it, or name another")
    found: dict[str, Shelved] = {}
    faults = []
    for name in sorted(files):
        ending = next((ending for ending in WEIGHTS if name.endswith(ending)), None)
        if ending is None or name.startswith("."):
            continue
        label = name.removesuffix(ending)
        if label in found:
            raise BackboneError(f"{url}: two files of weights are called {label}; rename one of them")
        checkpoint = f"{place.url.rstrip('/')}/{name}" if place.remote else place.shown(name)
        try:
            said = _described(place, label + DESCRIPTION) if label + DESCRIPTION in files else {}
            backbone = BackboneConfig.model_validate(
                {"name": label.partition(VARIANT)[0], **said, "checkpoint": checkpoint, "pretrained": False}
            )
        except BackboneError as error:
            faults.append(f"{checkpoint}: {error}")
            continue
        except ValidationError as error:
            faults.append(f"{checkpoint}: its description {label}{DESCRIPTION}: {first_misfit(error)}")
            continue
        version = fingerprint([backbone.model_dump(mode="json"), files[name]])
        found[label] = Shelved(label, backbone, version)
    return list(found.values()), faults


def _described(place: Place, name: str) -> dict[str, Any]:
    try:
        said = yaml.safe_load(place.attempt(name, "read", partial(place.read, name)) or b"{}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BackboneError(f"its description {name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(said, dict):
        raise BackboneError(
            f"its description {name} holds a {type(said).__name__}; want a mapping such as `exits: ...`"
        )
    if unknown := set(said) - {"name", "num_classes", "image_size", "exits"}:
        raise BackboneError(
            f"its description {name}: unknown {', '.join(sorted(map(str, unknown)))}; "
            "want name, num_classes, image_size, exits"
        )
    return said
