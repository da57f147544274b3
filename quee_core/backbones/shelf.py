"""A shelf: the folder or bucket that trained weights are dropped into, and what there is to sweep on it.

A file `NAME.safetensors` (or `.pth`, `.pt`, `.bin`) holds weights of the backbone NAME, as `list_backbones` knows it;
`NAME__anything.safetensors` further weights of it. A `NAME__anything.yaml` beside it may say what the name does not:
`name`, `num_classes`, `image_size` and `exits`, as in a sweep's section `backbone`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
import yaml
from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError

from quee_core.config import BackboneConfig
from quee_core.errors import BackboneError, first_misfit
from quee_core.fingerprints import fingerprint

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

    A description that cannot be used keeps its weights back, and no other's. Raises BackboneError if the shelf cannot
    be read, or two files have one label.
    """
    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    try:
        entries = fs.ls(root, detail=True)
    except FileNotFoundError:
        raise BackboneError(f"{url}: no such folder of backbones; make it, or name another") from None
    except OSError as error:
        raise BackboneError(f"{url}: the folder of backbones cannot be read: {error.strerror or error}") from error
    files = {info["name"].rpartition("/")[2]: info for info in entries if info["type"] == "file"}
    found: dict[str, Shelved] = {}
    faults = []
    for name in sorted(files):
        ending = next((ending for ending in WEIGHTS if name.endswith(ending)), None)
        if ending is None or name.startswith("."):
            continue
        label = name.removesuffix(ending)
        if label in found:
            raise BackboneError(f"{url}: two files of weights are called {label}; rename one of them")
        place = files[name]["name"] if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(files[name]["name"])
        try:
            said = _described(fs, files.get(label + DESCRIPTION))
            backbone = BackboneConfig.model_validate(
                {"name": label.partition(VARIANT)[0], **said, "checkpoint": place, "pretrained": False}
            )
        except BackboneError as error:
            faults.append(f"{place}: {error}")
            continue
        except ValidationError as error:
            faults.append(f"{place}: its description {label}{DESCRIPTION}: {first_misfit(error)}")
            continue
        version = fingerprint([json.loads(backbone.model_dump_json()), _bytes_known_by(files[name])])
        found[label] = Shelved(label, backbone, version)
    return list(found.values()), faults


def _described(fs: Any, info: Mapping[str, Any] | None) -> dict[str, Any]:
    if info is None:
        return {}
    name = info["name"].rpartition("/")[2]
    try:
        said = yaml.safe_load(fs.cat_file(info["name"]))
    except yaml.YAMLError as error:
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


def _bytes_known_by(info: Mapping[str, Any]) -> list[str]:
    """What a listing tells of a file's bytes: they change when they do."""
    return [str(info.get(key)) for key in ("size", "ETag", "mtime", "LastModified") if info.get(key) is not None]
