"""Segments compose to the whole model bit for bit; backbones by name load, or say why not."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from quee_core.backbones import (
    BACKBONES,
    SegmentedBackbone,
    check_exits,
    evenly_spaced_exits,
    list_backbones,
    load_backbone,
    segment,
)
from quee_core.backbones.micro_vit import micro_vit
from quee_core.backbones.registry import blank_backbone
from quee_core.config import SweepConfig
from quee_core.errors import BackboneError, CheckpointError
from quee_core.plan import resolve

# timm's real architectures, made shallow and small: name, overrides, prefix tokens
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 4}, 1),
    "average pooling and fc_norm": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "depth": 3, "global_pool": "avg", "fc_norm": True},
        1,
    ),
    "distilled deit": ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 4}, 2),
    "deit3: layer scale, positions without class token": ("deit3_small_patch16_224", {"img_size": 32, "depth": 2}, 1),
    "dinov2: layer scale, no head": ("vit_small_patch14_dinov2", {"img_size": 28, "depth": 3}, 1),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 3, "num_classes": 5}, 5),
    "clip: norm before the blocks": (
        "vit_base_patch16_clip_224",
        {"img_size": 32, "depth": 3, "embed_dim": 64, "num_heads": 2},
        1,
    ),
    "siglip: attention pooling, no class token": (
        "vit_base_patch16_siglip_224",
        {"img_size": 32, "depth": 3, "embed_dim": 64, "num_heads": 2, "num_classes": 7},
        0,
    ),
    "attention pooling without weights": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "depth": 2, "global_pool": "prr"},
        1,
    ),
    "attention pooling, a register but no class token": ("test_vit3", {"img_size": 64, "dynamic_img_size": False}, 1),
    "micro vit": ("micro_vit", {}, 1),
    "t2t: performer stem": ("t2t_vit_7", {"img_size": 32, "depth": 3, "num_classes": 5}, 1),
    "t2t: transformer stem": ("t2t_vit_t_14", {"img_size": 32, "depth": 2, "num_classes": 5}, 1),
}


def create(name: str, **overrides: Any) -> Any:
    """The model with weights drawn from a normal distribution, so that no part of it is an identity or a zero."""
    model: Any = timm.create_model(name, **overrides).eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0.02, 0.05, generator=rng)
        for name_, tensor in model.named_buffers():
            if name_.endswith(("running_mean", "running_var")):
                tensor.uniform_(0.5, 1.5, generator=rng)
    return model


def images_for(backbone: SegmentedBackbone, n: int = 2) -> Tensor:
    return torch.randn(n, *backbone.image_shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def tiny() -> Any:
    return create("vit_tiny_patch16_224", img_size=32, depth=6, embed_dim=48, num_classes=5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_segments_compose_to_the_whole_model_bit_for_bit(architecture: str) -> None:
    name, overrides, prefix_tokens = ARCHITECTURES[architecture]
    model = create(name, **overrides)
    backbone = segment(model, evenly_spaced_exits(len(model.blocks)), name)
    images = images_for(backbone)
    with torch.inference_mode():
        whole = model(images)
        tokens = backbone.stem(images)
        assert tokens.shape == (2, backbone.num_tokens, backbone.embed_dim)
        assert backbone.num_prefix_tokens == prefix_tokens
        for part in backbone.segments:
            tokens = part(tokens)
        assert torch.equal(backbone.output(tokens), whole)
        assert torch.equal(backbone(images), whole)
    assert whole.isfinite().all()
    assert whole.std() > 0
    assert (backbone.final is None) == (model.num_classes == 0)


@given(st.data())
def test_every_way_of_cutting_gives_the_same_answer(tiny: Any, data: st.DataObject) -> None:
    inner = data.draw(st.sets(st.integers(1, len(tiny.blocks) - 1)))
    exits = (*sorted(inner), len(tiny.blocks))
    backbone = segment(tiny, exits, "tiny")
    assert backbone.depth == len(exits)
    parts: list[Any] = list(backbone.segments)
    assert tuple(itertools.accumulate(len(part.blocks) for part in parts)) == exits
    images = images_for(backbone)
    with torch.inference_mode():
        assert torch.equal(backbone(images), tiny(images))


def test_the_view_shares_modules_and_parameters_with_the_model(tiny: Any) -> None:
    backbone = segment(tiny, (2, 6), "tiny")
    parts: list[Any] = list(backbone.segments)
    blocks = [block for part in parts for block in part.blocks]
    assert all(mine is theirs for mine, theirs in zip(blocks, tiny.blocks, strict=True))
    assert all(isinstance(block, Block) for block in blocks)
    assert {id(p) for p in backbone.parameters()} == {id(p) for p in tiny.parameters()}
    assert len(list(backbone.parameters())) == len(list(tiny.parameters()))


@pytest.mark.parametrize("training", [False, True])
def test_the_view_is_in_the_mode_of_the_model(training: bool) -> None:
    model = create("micro_vit", depth=2).train(training)
    model.blocks[0].train(not training)
    before = {name: part.training for name, part in model.named_modules()}
    backbone = segment(model, (1, 2), "mixed")
    assert {name: part.training for name, part in model.named_modules()} == before
    own = [part for part in backbone.modules() if part not in set(model.modules())]
    assert len(own) > 4
    assert {part.training for part in own} == {training}


def test_a_stem_does_not_carry_the_blocks_along(tiny: Any) -> None:
    stem = segment(tiny, (6,), "tiny").stem
    learnt = {tuple(p.shape) for p in stem.parameters()}
    assert learnt == {(1, 1, 48), (1, 5, 48), (48, 3, 16, 16), (48,)}


@pytest.mark.parametrize(
    "architecture",
    ["vit", "distilled deit", "dinov2 with registers", "attention pooling, a register but no class token"],
)
def test_pooled_tokens_are_thirteen_statistics(architecture: str) -> None:
    name, overrides, prefix = ARCHITECTURES[architecture]
    model = create(name, **overrides)
    backbone = segment(model, (len(model.blocks),), name)
    tokens = backbone.stem(images_for(backbone)).detach()
    pooled = backbone.pooled(tokens)
    assert pooled.shape == (2, backbone.pooled_width) == (2, 13 * backbone.embed_dim)
    found = pooled.unflatten(1, (13, backbone.embed_dim)).unbind(1)
    patches = tokens[:, prefix:]
    side = int(patches.shape[1] ** 0.5)
    grid = patches.unflatten(1, (side, side))
    torch.testing.assert_close(found[0], tokens[:, 0] if model.cls_token is not None else tokens.mean(1))
    torch.testing.assert_close(found[1], patches.mean(1))
    torch.testing.assert_close(found[2] ** 2, patches.var(1, unbiased=False), rtol=1e-4, atol=1e-6)
    assert torch.equal(found[3], patches.max(1).values)
    assert torch.equal(found[4], patches.min(1).values)
    before, behind = slice(0, (side + 1) // 2), slice(side // 2, side)
    quarters = [grid[:, r, c].flatten(1, 2) for r in (before, behind) for c in (before, behind)]
    for k, quarter in enumerate(quarters):
        torch.testing.assert_close(found[5 + k], quarter.mean(1))
        assert torch.equal(found[9 + k], quarter.max(1).values)
    assert torch.equal(torch.stack(found[9:]).max(0).values, found[3])  # the quarters leave no patch out


@given(st.integers(1, 60), st.integers(1, 12))
def test_default_exits_are_even_and_cut_any_backbone(blocks: int, count: int) -> None:
    exits = evenly_spaced_exits(blocks, count)
    assert check_exits(exits, blocks, "any") == exits
    assert len(exits) == min(blocks, count)
    steps = [after - before for before, after in itertools.pairwise((0, *exits))]
    assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize(
    ("exits", "says"),
    [
        ([], "empty"),
        ([2, 4, 9], "9 is beyond the backbone's depth; it has 6 blocks"),
        ([4, 2, 6], r"out of order; want \[2, 4, 6\]"),
        ([2, 2, 6], "2 is repeated"),
        ([0, 6], "0 is not a number of blocks"),
        ([-1, 6], "-1 is not a number of blocks"),
        ([True, 6], "True is not a number of blocks"),
        ([2.0, 6], r"2\.0 is not a number of blocks"),
        ([2, 4], r"want \[2, 4, 6\]"),
    ],
)
def test_exits_that_do_not_cut_the_backbone(tiny: Any, exits: list[int], says: str) -> None:
    with pytest.raises(BackboneError, match=f"tiny: exits .*{says}"):
        segment(tiny, exits, "tiny")


class _OwnPooling(VisionTransformer):
    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return 2 * super().pool(x, pool_type)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: nn.Linear(2, 2), "a Linear, not a timm VisionTransformer"),
        (lambda: timm.create_model("test_resnet"), "a ResNet, not a timm VisionTransformer"),
        (lambda: _OwnPooling(depth=1, embed_dim=12, num_heads=1, device="meta"), r"_OwnPooling has its own pool\(\)"),
        (lambda: timm.create_model("vit_tiny_patch16_224", device="meta", dynamic_img_size=True), "images of any size"),
        (lambda: timm.create_model("vit_tiny_patch16_224", device="meta", global_pool=""), "once for each token"),
    ],
)
def test_models_whose_forward_pass_segments_would_not_reproduce(build: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(BackboneError, match=says):
        segment(build(), (1,), "odd")


def test_listing_names_only_what_can_be_loaded() -> None:
    names = list_backbones()
    assert names[: len(BACKBONES)] == list(BACKBONES)
    assert len(set(names)) == len(names) > 150
    assert {"deit_tiny_distilled_patch16_224", "vit_small_patch14_dinov2", "vit_base_patch16_siglip_224"} <= set(names)
    assert not {"resnet18", "beit_base_patch16_224", "micro_vit"} & set(names)
    assert list_backbones("micro") == list(BACKBONES)
    assert list_backbones("deit*_tiny_*") == ["deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"]
    assert list_backbones("no such backbone") == []


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vitamin_small_224", "vit_tiny_r_s16_p8_224", "test_vit2"])
def test_a_listed_timm_name_can_be_cut(name: str) -> None:
    assert name in list_backbones()
    model: Any = timm.create_model(name, device="meta", dynamic_img_size=False)
    assert segment(model, evenly_spaced_exits(len(model.blocks)), name).depth == min(4, len(model.blocks))


def test_the_shipped_backbone_loads_and_is_frozen() -> None:
    loaded = load_backbone("micro_vit_fashion_mnist")
    assert loaded.backbone.exits == (2, 4, 6, 8)
    assert loaded.backbone.image_shape == (1, 28, 28)
    assert loaded.preprocessing["input_size"] == (1, 28, 28)
    assert (loaded.preprocessing["mean"], loaded.preprocessing["std"]) == ((0.2860,), (0.3530,))
    assert loaded.class_names is not None
    assert len(loaded.class_names) == loaded.backbone.num_classes == 10
    assert not loaded.backbone.training
    assert not any(p.requires_grad for p in loaded.backbone.parameters())
    assert load_backbone("micro_vit_fashion_mnist", exits=[8]).fingerprint == loaded.fingerprint


def test_the_shipped_backbone_knows_its_data_set() -> None:
    plan = resolve(SweepConfig())
    right = tested = 0
    with torch.inference_mode():
        for batch in plan.batches(plan.splits["test"]):
            answers = plan.loaded.backbone(batch.images).argmax(1)
            right += int((answers == torch.from_numpy(batch.labels)).sum())
            tested += len(answers)
    assert tested == 10_000
    assert right / tested >= 0.925


@pytest.fixture(scope="module")
def cifar_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "cifar.safetensors"
    save_file(create("micro_vit", img_size=32, in_chans=3).state_dict(), path)
    return path


def test_a_checkpoint_gives_the_model_that_it_was_saved_from(cifar_checkpoint: Path) -> None:
    loaded = load_backbone("micro_vit_cifar10", checkpoint=cifar_checkpoint, exits=(3, 8))
    assert loaded.backbone.exits == (3, 8)
    assert loaded.preprocessing["std"] == (0.2470, 0.2435, 0.2616)
    images = images_for(loaded.backbone)
    with torch.inference_mode():
        assert torch.equal(loaded.backbone(images), create("micro_vit", img_size=32, in_chans=3)(images))


def test_a_timm_model_with_classes_and_image_size_of_its_own(tmp_path: Path) -> None:
    model = create("vit_tiny_patch16_224", img_size=48, num_classes=3)
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    loaded = load_backbone(
        "vit_tiny_patch16_224", checkpoint=tmp_path / "mine.safetensors", num_classes=3, image_size=48
    )
    assert loaded.backbone.exits == (3, 6, 9, 12)
    assert loaded.preprocessing["input_size"] == (3, 48, 48)
    assert loaded.preprocessing["mean"] == (0.5, 0.5, 0.5)
    assert loaded.class_names is None
    images = images_for(loaded.backbone)
    with torch.inference_mode():
        assert torch.equal(loaded.backbone(images), model(images))
    headless = load_backbone(
        "vit_tiny_patch16_224", checkpoint=tmp_path / "mine.safetensors", num_classes=0, image_size=48
    )
    assert headless.backbone.final is None
    assert headless.fingerprint != loaded.fingerprint


DINO = "vit_small_patch14_reg4_dinov2"


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DINOv2 as it is published, without a head; small images, random weights."""
    path = tmp_path_factory.mktemp("dino") / "dino.safetensors"
    save_file(timm.create_model(DINO, img_size=28, dynamic_img_size=False).state_dict(), path)
    return path


@pytest.mark.parametrize("sees", [1, 2])
@pytest.mark.parametrize("names", ["", "linear."])
def test_a_backbone_without_a_head_takes_one_from_a_file(dino: Path, tmp_path: Path, sees: int, names: str) -> None:
    """On the class token; or on it and the mean of the patches, registers left out, as DINOv2's own are."""
    weight, bias = torch.randn(7, sees * 384), torch.randn(7)
    torch.save({f"{names}weight": weight, f"{names}bias": bias}, tmp_path / "head.pth")
    loaded = load_backbone(DINO, exits=[6, 12], checkpoint=dino, image_size=28, head=tmp_path / "head.pth")
    headless = load_backbone(DINO, exits=[6, 12], checkpoint=dino, image_size=28)
    assert (headless.backbone.num_classes, loaded.backbone.num_classes) == (0, 7)
    assert headless.fingerprint != loaded.fingerprint
    images = images_for(loaded.backbone)
    with torch.inference_mode():
        tokens = headless.backbone.stem(images)
        for part in headless.backbone.segments:
            tokens = part(tokens)
        normed = headless.backbone.output.norm(tokens)  # type: ignore[operator]
        seen = torch.cat([normed[:, 0], normed[:, 1 + 4 :].mean(dim=1)][:sees], dim=1)
        assert torch.allclose(loaded.backbone(images), seen @ weight.T + bias, atol=1e-4)
    width = loaded.backbone.attached_head_width
    assert width == (None if sees == 1 else 2 * 384)
    blank = blank_backbone(DINO, exits=[6, 12], num_classes=7, image_size=(28, 28), head_width=width)
    blank.load_state_dict(loaded.backbone.state_dict())
    with torch.inference_mode():
        assert torch.equal(blank(images), loaded.backbone(images))


def test_heads_that_do_not_fit_say_why(dino: Path, tmp_path: Path) -> None:
    head = tmp_path / "head.safetensors"

    def told(content: dict[str, Tensor], **options: Any) -> str:
        save_file(content, head)
        with pytest.raises(BackboneError) as caught:
            load_backbone(**{"name": DINO, "checkpoint": dino, "image_size": 28, "head": head, **options})
        return str(caught.value)

    fits = {"weight": torch.ones(7, 384), "bias": torch.ones(7)}
    assert "want [classes, 384] or [classes, 768], and [classes]" in told(fits | {"weight": torch.ones(7, 5 * 384)})
    assert "bias [6]" in told(fits | {"bias": torch.ones(6)})
    assert "want the weight and the bias of one layer" in told({"weight": torch.ones(7, 384)})
    assert "not finite" in told(fits | {"bias": torch.full((7,), torch.inf)})
    assert "the file says how many; leave one out" in told(fits, num_classes=7)
    micro = {"name": "micro_vit_fashion_mnist", "checkpoint": None, "image_size": None}
    assert "the backbone has a head of 10 classes; leave that out by num_classes 0" in told(fits, **micro)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("vit_tiny_patch16_244", {}, "unknown backbone; did you mean 'vit_tiny_patch16_224'"),
        ("micro_vit_fashion", {}, "did you mean 'micro_vit_fashion_mnist'"),
        ("micro_vit", {}, "unknown backbone"),
        ("", {}, "unknown backbone"),
        ("hf-hub:someone/something", {}, "unknown backbone"),
        ("resnet18", {"pretrained": True}, "not a timm VisionTransformer"),
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1K", {"pretrained": True}, "did you mean 'augreg_in21k_ft_in1k'"),
        ("vit_tiny_patch16_224", {}, "no weights: give a checkpoint, or"),
        ("micro_vit_cifar10", {}, "no weights for it; give a checkpoint"),
        ("vit_tiny_patch16_224", {"pretrained": True, "checkpoint": Path("a")}, "give one of the two"),
        ("vit_tiny_patch16_224", {"pretrained": True, "num_classes": 10}, "does not fit the pretrained head.* 1000"),
        ("vit_tiny_patch16_224", {"pretrained": True, "num_classes": 1}, "want 2 or more, or 0"),
        ("vit_tiny_patch16_224", {"pretrained": True, "num_classes": -3}, "want 2 or more, or 0"),
        ("vit_tiny_patch16_224", {"pretrained": True, "image_size": 100}, "not a multiple of its patch size 16"),
        ("vit_tiny_patch16_224", {"pretrained": True, "image_size": 0}, "want a number of pixels"),
        ("vit_tiny_patch16_224", {"pretrained": True, "exits": [6, 13]}, "13 is beyond the backbone's depth"),
        ("micro_vit_fashion_mnist", {"image_size": 30}, "the stem's stride is 4"),
        ("micro_vit_fashion_mnist", {"exits": [4, 9]}, "9 is beyond the backbone's depth"),
    ],
)
def test_requests_that_cannot_be_met_say_why(name: str, options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=says):
        load_backbone(name, **options, cache_dir=tmp_path, offline=True)


def test_a_checkpoint_for_other_classes_says_what_to_set(cifar_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cifar\.safetensors: has a head of 10 classes.*set num_classes to 10"):
        load_backbone("micro_vit_cifar10", checkpoint=cifar_checkpoint, num_classes=37)


def test_a_checkpoint_for_another_image_size_says_so(cifar_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pos_embed.*another image size"):
        load_backbone("micro_vit_cifar10", checkpoint=cifar_checkpoint, image_size=28)


def test_pretrained_weights_that_are_not_in_the_cache_need_a_network(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"cannot get .* of timm/vit_tiny_.*offline\): run once with a network"):
        load_backbone("vit_tiny_patch16_224", pretrained=True, cache_dir=tmp_path, offline=True)


def test_pretrained_weights_that_no_hub_has_name_their_address(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"on no hub, only at https://.*give the file as a checkpoint"):
        load_backbone("vit_huge_patch14_gap_224.in1k_ijepa", pretrained=True, cache_dir=tmp_path, offline=True)


def in_hub_cache(cache: Path, repository: str, weights: dict[str, Tensor]) -> Path:
    """Weights laid out as huggingface_hub leaves them in its cache after a download."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    save_file(weights, snapshot / "model.safetensors")
    return snapshot / "model.safetensors"


def test_pretrained_weights_in_the_cache_load_without_a_network(tmp_path: Path) -> None:
    model = create("test_vit")
    repository = str(timm.get_pretrained_cfg_value("test_vit", "hf_hub_id"))
    file = in_hub_cache(tmp_path, repository, model.state_dict())
    loaded = load_backbone("test_vit", pretrained=True, cache_dir=tmp_path, offline=True)
    images = images_for(loaded.backbone)
    with torch.inference_mode():
        assert torch.equal(loaded.backbone(images), model(images))
    smaller = load_backbone("test_vit", pretrained=True, image_size=96, cache_dir=tmp_path, offline=True)
    assert smaller.backbone.image_shape == (3, 96, 96)
    assert smaller.preprocessing["input_size"] == (3, 96, 96)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged, cut short"):
        load_backbone("test_vit", pretrained=True, cache_dir=tmp_path, offline=True)
    shutil.rmtree(tmp_path / f"models--{repository.replace('/', '--')}")
    in_hub_cache(tmp_path, repository, create("test_vit2", dynamic_img_size=False).state_dict())
    with pytest.raises(CheckpointError, match="does not fit test_vit"):
        load_backbone("test_vit", pretrained=True, cache_dir=tmp_path, offline=True)


def test_micro_vit_refuses_what_it_cannot_be() -> None:
    with pytest.raises(BackboneError, match="no pretrained weights in timm"):
        micro_vit(pretrained=True)
    with pytest.raises(BackboneError, match="patch_size 7"):
        micro_vit(patch_size=7)
