"""Backbones by name: the micro ViTs of quee's own, and every timm model that is a plain `VisionTransformer`."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.data.config import resolve_model_data_config
from timm.models import PretrainedCfg
from torch import Tensor, nn

import quee_core.backbones.t2t_vit  # noqa: F401 (tells timm of its models)
from quee_core.backbones.checkpoints import load_weights, read_checkpoint, weights_fingerprint, without_head
from quee_core.backbones.linear_head import attach_head, blank_head
from quee_core.backbones.micro_vit import micro_vit
from quee_core.backbones.segmented import (
    SegmentedBackbone,
    check_exits,
    check_segmentable,
    evenly_spaced_exits,
    segment,
)
from quee_core.errors import BackboneError, CheckpointError, MissingWeightsError, did_you_mean

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "micro_vit"

# source modules of what timm knows, all of whose models are instances of VisionTransformer
_TIMM_MODULES = ("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin", "t2t_vit")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_TIMEOUT = 10.0  # seconds
RANDOM_SEED = 0  # of weights that are drawn


@dataclass(frozen=True, slots=True)
class BackboneEntry:
    """A backbone of quee's own: a micro ViT for one data set.

    model_args: what `micro_vit` is built with. mean, std: of the pixels in [0, 1], by channel. weights: the file that
    quee ships, None where a checkpoint is needed. class_names: in the order of the logits.
    """

    description: str
    model_args: Mapping[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    weights: Path | None


@dataclass(frozen=True, slots=True)
class LoadedBackbone:
    """A segmented backbone in evaluation mode, without gradients, on the CPU, and what must be known to use it.

    preprocessing: timm's data config (`input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`).
    fingerprint: sha256 over architecture and weights. It does not depend on where the backbone is cut: the tables of
    an exit depend on the fingerprint and on `backbone.exits` up to that exit. class_names: in the order of the
    logits, None where only the checkpoint's owner knows them.
    """

    backbone: SegmentedBackbone
    preprocessing: dict[str, Any]
    fingerprint: str
    class_names: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class _Asked:
    """What `load_backbone` was asked for, its arguments as they are there."""

    name: str
    exits: Sequence[int] | None = None
    checkpoint: Path | None = None
    num_classes: int | None = None
    pretrained: bool = False
    image_size: int | None = None
    random_weights: bool = False
    cache_dir: Path | None = None
    offline: bool = False


_BACKBONES = {
    "micro_vit_fashion_mnist": BackboneEntry(
        description="1.2 M parameters, 28x28 grey images, 10 kinds of clothing; its weights are part of quee",
        model_args={"img_size": 28, "in_chans": 1, "num_classes": 10},
        mean=(0.2860,),
        std=(0.3530,),
        class_names=(
            "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
        ),
        weights=ASSETS / "micro_vit_fashion_mnist.safetensors",
    ),
    "micro_vit_glyphs": BackboneEntry(
        description="1.2 M parameters, 28x28 grey images, 35 letters and digits; its weights are part of quee",
        model_args={"img_size": 28, "in_chans": 1, "num_classes": 35},
        mean=(0.5,),
        std=(0.25,),
        class_names=tuple("0123456789ABCDEFGHIJKLMNPQRSTUVWXYZ"),
        weights=ASSETS / "micro_vit_glyphs.safetensors",
    ),
    "micro_vit_cifar10": BackboneEntry(
        description="1.2 M parameters, 32x32 colour images, 10 kinds of animals and vehicles; needs a checkpoint",
        model_args={"img_size": 32, "in_chans": 3, "num_classes": 10},
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        weights=None,
    ),
}  # fmt: skip
BACKBONES: Mapping[str, BackboneEntry] = MappingProxyType(_BACKBONES)


def list_backbones(pattern: str = "") -> list[str]:
    """Names that `load_backbone` takes: quee's own first, then timm's, each in order.

    pattern: keeps names that contain it, or that match it if it has a wildcard (`*`, `?`, `[`).
    """
    wanted = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    return [name for name in (*BACKBONES, *_timm_names()) if fnmatch.fnmatchcase(name, wanted)]


def load_backbone(
    name: str,
    *,
    exits: Sequence[int] | None = None,
    checkpoint: Path | None = None,
    num_classes: int | None = None,
    pretrained: bool = False,
    image_size: int | None = None,
    head: Path | None = None,
    random_weights: bool = False,
    cache_dir: Path | None = None,
    offline: bool = False,
) -> LoadedBackbone:
    """The backbone `name` with trained weights, or with `random_weights` as it is before training, cut at `exits`.

    name: one of `list_backbones`; a timm name may carry its weights' tag: `deit3_small_patch16_224.fb_in1k`.
    exits: blocks that have run at each exit, strictly ascending, the last all of them; by default four, evenly spaced.
    checkpoint: weights file (see `read_checkpoint`); for quee's own backbones it replaces the weights that quee ships.
    num_classes: classes of the head, if not the model's own; 0 leaves the head out of a checkpoint that has one.
    pretrained: take timm's own weights, from the cache of Hugging Face's hub or by download.
    image_size: side of the input in pixels, if not the model's own; a multiple of the patch size.
    head: file of a linear head for a backbone without one (see `attach_head`), which says how many classes there are.
    random_weights: the architecture's own initialisation instead of any weights, the same in every process.
    cache_dir: the hub's cache, if not the usual one. offline: look in the cache alone.

    What can be checked without weights is checked before any are read or fetched.
    Raises BackboneError for an unknown name, exits that do not cut the backbone, an impossible size or class count, or
    two sources of weights; MissingWeightsError for none, a file that is not there, or a download that fails;
    CheckpointError for weights that are damaged or do not fit.
    """
    if head is not None and num_classes:
        raise BackboneError(f"{name}: head {head} and num_classes {num_classes}: the file says how many; leave one out")
    model, preprocessing, class_names = _loaded(
        _Asked(name, exits, checkpoint, num_classes, pretrained, image_size, random_weights, cache_dir, offline)
    )
    if head is not None:
        if model.num_classes:
            raise BackboneError(
                f"{name}: head {head}: the backbone has a head of {model.num_classes} classes; leave that out by "
                "num_classes 0, or leave the file out"
            )
        attach_head(model, head)
    model.eval().requires_grad_(False)
    cuts = evenly_spaced_exits(len(model.blocks)) if exits is None else exits
    return LoadedBackbone(segment(model, cuts, name), preprocessing, weights_fingerprint(model), class_names)


def load_model(
    name: str,
    *,
    new_classes: int,
    seed: int,
    exits: Sequence[int] | None = None,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    image_size: int | None = None,
    random_weights: bool = False,
) -> tuple[Any, dict[str, Any], str]:
    """timm's model `name` with trained weights and a new head for `new_classes` classes, to be fine-tuned.

    seed: of the new head. The others are as in `load_backbone`, and so is what is raised. Returns the model, timm's
    data config, and the fingerprint of the weights that it starts from.
    """
    asked = _Asked(
        name, exits, checkpoint, num_classes=0, pretrained=pretrained, image_size=image_size,
        random_weights=random_weights,
    )  # fmt: skip
    model, preprocessing, _ = _loaded(asked)
    start = weights_fingerprint(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.reset_classifier(new_classes)
    return model, preprocessing, start


def blank_backbone(
    name: str,
    *,
    exits: Sequence[int],
    num_classes: int,
    image_size: tuple[int, int],
    head_width: int | None = None,
) -> SegmentedBackbone:
    """The architecture `name` cut at `exits`, its weights to be loaded: what a deployed router is put together from.

    num_classes: classes of its head, 0 for none. image_size: (height, width) in pixels. head_width: features that the
    head takes, if it is not the architecture's own. In evaluation mode, without gradients.
    Raises BackboneError for a name that is not known here, or exits that do not cut it.
    """
    entry = BACKBONES.get(name)
    if entry is not None:
        model: Any = micro_vit(**{**entry.model_args, "num_classes": num_classes, "img_size": image_size[0]})
    else:
        _published(name)
        options: dict[str, Any] = {"num_classes": num_classes, "dynamic_img_size": False}
        usual: Any = check_segmentable(timm.create_model(name, device="meta", **options), name)
        if tuple(usual.patch_embed.img_size) != tuple(image_size):
            options["img_size"] = image_size
        model = timm.create_model(name, **options)
    if head_width is not None:
        model.head = blank_head(head_width, num_classes)
    model.eval().requires_grad_(False)
    return segment(model, exits, name)


def _loaded(asked: _Asked) -> tuple[Any, dict[str, Any], tuple[str, ...] | None]:
    """The whole model, timm's data config, and names of its classes where they are known; raises as `load_backbone`."""
    if asked.random_weights and (asked.pretrained or asked.checkpoint is not None):
        given = "pretrained weights" if asked.pretrained else f"checkpoint {asked.checkpoint}"
        raise BackboneError(f"{asked.name}: random weights and {given}: give one of the two")
    if asked.pretrained and asked.checkpoint is not None:
        raise BackboneError(f"{asked.name}: checkpoint {asked.checkpoint} and pretrained weights: give one of the two")
    if asked.num_classes is not None and (asked.num_classes < 0 or asked.num_classes == 1):
        raise BackboneError(f"{asked.name}: num_classes {asked.num_classes}: want 2 or more, or 0 for no head")
    if asked.image_size is not None and asked.image_size < 1:
        raise BackboneError(f"{asked.name}: image_size {asked.image_size}: want a number of pixels")
    entry = BACKBONES.get(asked.name)
    if entry is not None:
        model = _own_model(asked, entry)
        preprocessing = _own_preprocessing(entry, model)
        class_names = entry.class_names if model.num_classes == len(entry.class_names) else None
    else:
        model = _timm_model(asked)
        preprocessing = dict(resolve_model_data_config(model))  # type: ignore[no-untyped-call]
        preprocessing["input_size"] = (model.in_chans, *model.patch_embed.img_size)
        class_names = None
    return model, preprocessing, class_names


def _own_model(asked: _Asked, entry: BackboneEntry) -> Any:
    options = dict(entry.model_args)
    if asked.num_classes is not None:
        options["num_classes"] = asked.num_classes
    if asked.image_size is not None:
        options["img_size"] = asked.image_size
    model = _drawn(lambda: micro_vit(**options))
    if asked.exits is not None:
        check_exits(asked.exits, len(model.blocks), asked.name)
    if asked.random_weights:
        return model
    source = asked.checkpoint or entry.weights
    if source is None:
        raise MissingWeightsError(f"{asked.name}: quee ships no weights for it; give a checkpoint")
    if asked.checkpoint is None and not source.exists():
        raise BackboneError(f"{asked.name}: its weights {source} are missing from this installation; reinstall quee")
    _load_file(model, source)
    return model


def _own_preprocessing(entry: BackboneEntry, model: Any) -> dict[str, Any]:
    return {
        "input_size": (model.in_chans, *model.patch_embed.img_size),
        "interpolation": "bicubic",
        "mean": entry.mean,
        "std": entry.std,
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


def _timm_model(asked: _Asked) -> Any:
    published = _published(asked.name)
    if not asked.pretrained and asked.checkpoint is None and not asked.random_weights:
        raise MissingWeightsError(f"{asked.name}: no weights: give a checkpoint, or ask for timm's own with pretrained")
    if asked.pretrained and asked.num_classes not in (None, 0, published.num_classes):
        raise BackboneError(
            f"{asked.name}: num_classes {asked.num_classes} does not fit the pretrained head, which has "
            f"{published.num_classes} classes: leave num_classes out, or give a checkpoint that was trained on yours"
        )
    options: dict[str, Any] = {"num_classes": asked.num_classes, "dynamic_img_size": False}
    if asked.image_size is not None:
        options["img_size"] = asked.image_size
    # without storage, so that a fault costs neither the time to fill large weights nor their download
    skeleton: Any = check_segmentable(timm.create_model(asked.name, device="meta", **options), asked.name)
    if asked.exits is not None:
        check_exits(asked.exits, len(skeleton.blocks), asked.name)
    if asked.image_size is not None and (patch := _indivisible_by(skeleton)):
        raise BackboneError(f"{asked.name}: image_size {asked.image_size} is not a multiple of its patch size {patch}")
    if asked.random_weights:
        return _drawn(lambda: timm.create_model(asked.name, **options))
    if asked.checkpoint is not None:
        model = timm.create_model(asked.name, **options)
        _load_file(model, asked.checkpoint)
        return model
    file = _fetch(asked.name, published, asked.cache_dir, asked.offline)
    return _load_published(asked.name, options, file)


def _drawn(make: Callable[[], nn.Module]) -> Any:
    """A model as it is initialised from `RANDOM_SEED`, torch's generator being left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        return make()


def _load_file(model: Any, source: Path) -> None:
    state = read_checkpoint(source)
    load_weights(model, without_head(state) if model.num_classes == 0 else state, str(source))


def _load_published(name: str, options: dict[str, Any], file: Path) -> nn.Module:
    """Through timm, which knows how to turn each publisher's names and image sizes into its own."""
    weights: dict[str, Tensor] = read_checkpoint(file)
    try:
        model: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": weights}, **options)
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{file}: does not fit {name} ({_first_line(error)}); delete it to fetch it again"
        ) from error
    model.pretrained_cfg["state_dict"] = None  # timm would keep a second copy of the weights alive there
    return model  # type: ignore[no-any-return]


def _fetch(name: str, published: PretrainedCfg, cache_dir: Path | None, offline: bool) -> Path:
    """The published weights as a file in the hub's cache, downloaded if they are not there yet."""
    hub = published.hf_hub_id
    if not hub:
        where = (
            f"only at {published.url}: download them, and give the file as a checkpoint" if published.url else "nowhere"
        )
        raise MissingWeightsError(f"{name}: timm's weights are on no hub, {where}")
    repository, _, tag = hub.partition("@")
    revision = tag or None
    filenames = [published.hf_hub_filename] if published.hf_hub_filename else list(_HUB_FILES)
    for filename in filenames:
        try:
            cached = hf_hub_download(
                repository, filename, revision=revision, cache_dir=cache_dir, local_files_only=True
            )
            return Path(cached)
        except LocalEntryNotFoundError:
            continue
    reason = "not in the local cache, and offline"
    for filename in () if offline else filenames:
        try:
            # asked by itself first: without an answer, the download alone would go on trying for minutes
            get_hf_file_metadata(hf_hub_url(repository, filename, revision=revision), timeout=_HUB_TIMEOUT)
            return Path(hf_hub_download(repository, filename, revision=revision, cache_dir=cache_dir))
        except EntryNotFoundError as error:
            reason = _first_line(error)
        except Exception as error:  # the hub, its HTTP client and the disk each raise families of their own
            reason = _first_line(error)
            break
    raise MissingWeightsError(
        f"{name}: cannot get the pretrained weights of {repository} ({reason}): run once with a network, "
        "or give a checkpoint file"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _published(name: str) -> PretrainedCfg:
    """What timm knows of the weights that `name` stands for. Raises BackboneError for a name that cannot be loaded."""
    architecture, _, tag = name.partition(".")
    known = _timm_names()
    if architecture not in known:
        if timm.is_model(architecture) and architecture != micro_vit.__name__:
            raise BackboneError(
                f"{name}: not a timm VisionTransformer; only those can be cut into segments, see `quee backbones list`"
            )
        raise BackboneError(
            f"{name}: unknown backbone; {did_you_mean(architecture, (*BACKBONES, *known))} "
            "(`quee backbones list PATTERN` shows all that fit)"
        )
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise BackboneError(f"{name}: timm has no weights with the tag {tag!r}; {did_you_mean(tag, tags)}")
    return timm.get_pretrained_cfg(name) or PretrainedCfg()


def _timm_names() -> list[str]:
    return sorted({name for module in _TIMM_MODULES for name in timm.list_models(module=module)})


def _indivisible_by(model: Any) -> int | None:
    """The patch size in pixels that the image's sides are not multiples of, if so; timm would drop the edge pixels."""
    strides: int | tuple[int, int] = model.patch_embed.feat_ratio(as_scalar=False)
    pair = (strides, strides) if isinstance(strides, int) else strides
    return next((stride for side, stride in zip(model.patch_embed.img_size, pair, strict=True) if side % stride), None)
