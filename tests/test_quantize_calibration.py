"""Calibrations of whole backbones: stored and read back, independent of exits, bit-widths and batches; faults named."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from quee_core.backbones import SegmentedBackbone, load_backbone, segment
from quee_core.backbones.micro_vit import micro_vit
from quee_core.data.datasets import load_dataset
from quee_core.data.loading import image_batches
from quee_core.data.preprocessing import Preprocessing
from quee_core.data.splits import Selection
from quee_core.errors import DamagedTableError, NumericError, QuantizationError, ShapeMismatchError
from quee_core.quantize.calibration import (
    Calibration,
    QuantizedBackbone,
    calibrate,
    linear_from_arrays,
    linear_to_arrays,
    quantize_backbone,
    quantize_linear,
)
from quee_core.quantize.layers import QuantAttention, QuantConv2d, QuantLinear
from quee_core.quantize.methods import QUANT_METHODS

Network = tuple[SegmentedBackbone, Tensor]


def tiny(exits: Sequence[int] = (1, 3), **overrides: Any) -> SegmentedBackbone:
    """Three blocks of width 36, which no vector register divides, on 12 x 12 images."""
    torch.manual_seed(0)
    settings = {"depth": 3, "embed_dim": 36, "num_heads": 3, "img_size": 12} | overrides
    return segment(moved(micro_vit(**settings)), exits, "tiny")


def moved(model: nn.Module) -> nn.Module:
    """`model` with norms, biases and LayerScale away from what they are initialised to, where they would do nothing."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        elif "embed" not in name and parameter.requires_grad:  # random features are what they are
            parameter.data *= 2
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(1.7)
    return model.eval().requires_grad_(False)


def some_images(backbone: SegmentedBackbone, count: int, seed: int = 3) -> Tensor:
    return torch.randn(count, *backbone.image_shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def through(quantized: QuantizedBackbone, bits: int, images: Tensor) -> list[Tensor]:
    """Tokens behind the stem and every segment at one bit-width, then the final answer."""
    seen = [quantized.stem(images)]
    for index in range(quantized.backbone.depth):
        seen.append(quantized.segments(index, bits)(seen[-1]))
    return seen if quantized.final is None else [*seen, quantized.final(seen[-1])]


@pytest.fixture(scope="module")
def network() -> Network:
    backbone = tiny()
    return backbone, some_images(backbone, 40)


@pytest.fixture(scope="module")
def calibration(network: Network) -> Calibration:
    return calibrate(*network, (3, 8), "mse", edge_bits=8)


@pytest.mark.parametrize("method", sorted(QUANT_METHODS))
@pytest.mark.parametrize("bits", [3, 8])
def test_an_image_gets_the_same_bits_alone_and_in_any_batch(network: Network, method: str, bits: int) -> None:
    quantized = quantize_backbone(network[0], calibrate(*network, (bits,), method, edge_bits=8), [bits])
    images = some_images(network[0], 256, seed=9)
    together = through(quantized, bits, images)
    for group in ([0], [255], [17, 3], list(range(100, 131))):
        apart = through(quantized, bits, images[group])
        for whole, part in zip(together, apart, strict=True):
            assert torch.equal(whole[group], part)


@pytest.mark.parametrize("method", sorted(QUANT_METHODS))
def test_a_calibration_is_read_back_with_the_same_results(network: Network, method: str) -> None:
    backbone, images = network
    made = calibrate(backbone, images, (2, 5), method, edge_bits=8)
    read = Calibration.from_bytes(made.to_bytes())
    assert (read.method, read.edge, read.images) == (method, 8, 40)
    assert read.fingerprint() == made.fingerprint()
    assert [read.fingerprint_of(b) for b in (2, 5, 8, 32)] == [made.fingerprint_of(b) for b in (2, 5, 8, 32)]
    pair = [quantize_backbone(backbone, of, [2, 5]) for of in (made, read)]
    for bits in (2, 5):
        for ours, theirs in zip(*(through(of, bits, images[:5]) for of in pair), strict=True):
            assert torch.equal(ours, theirs)


def test_a_bit_width_does_not_depend_on_the_others_nor_on_the_exits(network: Network, calibration: Calibration) -> None:
    images = network[1]
    other = calibrate(tiny((1, 2, 3)), images, (2, 3, 8), "mse", edge_bits=8)
    assert other.fingerprint_of(3) == calibration.fingerprint_of(3)
    assert other.fingerprint_of(8) == calibration.fingerprint_of(8)
    assert other.fingerprint() != calibration.fingerprint()
    elsewhere = calibrate(tiny(), images.flip(0)[:30], (3, 8), "mse", edge_bits=8)
    assert elsewhere.fingerprint_of(3) != calibration.fingerprint_of(3)


def test_batches_of_images_serve_as_well(network: Network, calibration: Calibration) -> None:
    backbone, images = network
    again = calibrate(backbone, iter(images.split(7)), (3, 8), "mse", edge_bits=8)
    assert again.fingerprint() == calibration.fingerprint()


def test_32_bits_is_the_backbone_itself_which_stays_as_it_was(network: Network, calibration: Calibration) -> None:
    backbone, images = network
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    wanted = backbone(images)
    quantized = quantize_backbone(backbone, calibration, [3, 32])
    through(quantized, 3, images)
    assert quantized.bits == (3, 32)
    assert all(quantized.segments(k, 32) is backbone.segments[k] for k in range(2))
    assert torch.equal(backbone(images), wanted)
    after = backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_edge_bits_stem_and_head_stay_in_float(network: Network) -> None:
    backbone, images = network
    made = calibrate(backbone, images, (4, 32), "minmax", edge_bits=32)
    quantized = quantize_backbone(backbone, made, [4])
    assert quantized.stem is backbone.stem
    assert quantized.final is backbone.final
    assert set(made.layers) == {4}
    only_float = calibrate(backbone, images, (32,), "minmax", edge_bits=32)
    assert torch.equal(through(quantize_backbone(backbone, only_float, [32]), 32, images)[-1], backbone(images))


def test_the_given_tokens_are_left_as_they_were(network: Network, calibration: Calibration) -> None:
    quantized = quantize_backbone(network[0], calibration, [3])
    with torch.inference_mode():
        tokens = quantized.stem(network[1])
        before = tokens.clone()
        quantized.segments(0, 3)(tokens)
    assert torch.equal(tokens, before)


def test_every_product_is_quantised(network: Network, calibration: Calibration) -> None:
    quantized = quantize_backbone(network[0], calibration, [3])
    assert quantized.final is not None
    parts = [quantized.stem, quantized.segments(0, 3), quantized.segments(1, 3), quantized.final]
    kinds = [type(module) for part in parts for module in part.modules()]
    assert kinds.count(QuantConv2d) == 3
    assert kinds.count(QuantAttention) == 3
    assert kinds.count(QuantLinear) == 3 * 4 + 1
    assert not {nn.Linear, nn.Conv2d, nn.BatchNorm2d} & set(kinds)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_small_patch14_dinov2": {"dynamic_img_size": False, "num_classes": 0, "init_values": 0.5},
    "vit_small_patch14_reg4_dinov2": {"dynamic_img_size": False, "num_classes": 0, "init_values": 0.5},
    "vit_medium_patch16_reg1_gap_256": {"qk_norm": True, "norm_layer": nn.LayerNorm},
    "t2t_vit_14": {"embed_dim": 64, "num_heads": 1},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_eight_bits_are_close_to_float_for_every_family(name: str) -> None:
    torch.manual_seed(0)
    patch = 14 if "patch14" in name else 16
    options = {"img_size": 3 * patch, "depth": 2, "embed_dim": 48, "num_heads": 3} | ARCHITECTURES[name]
    backbone = segment(moved(timm.create_model(name, **options)), (1, 2), name)
    images = some_images(backbone, 24)
    for method in QUANT_METHODS:
        made = calibrate(backbone, images, (8, 3), method, edge_bits=8)
        quantized = quantize_backbone(backbone, made, (8, 3))
        assert (quantized.final is None) == (backbone.num_classes == 0)
        wanted, got, coarse = (through(quantized, bits, some_images(backbone, 9, seed=4)) for bits in (32, 8, 3))
        signal = float(wanted[2].square().mean())
        assert float((got[2] - wanted[2]).square().mean()) < 0.01 * signal
        assert float((coarse[2] - wanted[2]).square().mean()) > float((got[2] - wanted[2]).square().mean())
        tokens = backbone.stem(some_images(backbone, 9, seed=4))
        assert float((got[0] - tokens).square().mean()) < 0.002 * float(tokens.square().mean())


def test_the_bundled_backbone_keeps_its_answers() -> None:
    loaded = load_backbone("micro_vit_fashion_mnist", exits=[4, 8])
    dataset = load_dataset("fashion_mnist")
    transform = Preprocessing.from_data_config(loaded.preprocessing).transform()
    selected = [Selection("heldout", np.arange(0, 32)), Selection("test", np.arange(0, 100))]
    seen, new = (next(iter(image_batches(dataset, [part], transform, 200))).images for part in selected)
    with torch.inference_mode():
        wanted = loaded.backbone(new)
    answers = {}
    for method, bits in (("minmax", 3), ("minmax", 8), ("mse", 3)):
        made = calibrate(loaded.backbone, seen, (bits,), method, edge_bits=8)
        answers[method, bits] = through(quantize_backbone(loaded.backbone, made, (bits,)), bits, new)[-1]
    agreement = {key: float((got.argmax(1) == wanted.argmax(1)).float().mean()) for key, got in answers.items()}
    distance = {key: float((got - wanted).square().mean()) for key, got in answers.items()}
    assert agreement["minmax", 8] >= 0.97
    assert agreement["mse", 3] >= 0.88
    assert distance["mse", 3] < 0.5 * distance["minmax", 3]


def test_a_linear_layer_by_itself_is_stored_as_arrays() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(10, 4).requires_grad_(False)
    inputs = torch.randn(300, 10)
    assert quantize_linear(linear, inputs, 32, "mse") is linear
    for method in ("minmax", "mse"):
        layer = quantize_linear(linear, inputs, 8, method)
        assert isinstance(layer, QuantLinear)
        read = linear_from_arrays(linear_to_arrays(layer))
        assert torch.equal(read(inputs), layer(inputs))
        torch.testing.assert_close(layer(inputs), linear(inputs), rtol=0, atol=0.1)
    with pytest.raises(DamagedTableError):
        linear_from_arrays({"weight": np.zeros((4, 10), np.int8)})
    with pytest.raises(ShapeMismatchError, match=r"\[n, 10\]"):
        quantize_linear(linear, torch.randn(5, 9), 8, "mse")
    with pytest.raises(NumericError):
        quantize_linear(linear, torch.full((5, 10), torch.nan), 8, "mse")


def test_values_that_are_not_finite_name_their_layer() -> None:
    backbone = tiny()
    backbone.segments[1].blocks[0].mlp.fc1.bias.data[3] = torch.nan
    with pytest.raises(NumericError, match=r"blocks\.1\.mlp\.fc2"):
        calibrate(backbone, some_images(backbone, 8), (8,), "mse", edge_bits=8)
    images = some_images(tiny(), 8)
    images[2, 0, 0, 0] = torch.inf
    with pytest.raises(NumericError, match=r"stem\.patch_embed\.conv1"):
        calibrate(tiny(), images, (8,), "minmax", edge_bits=8)


def test_what_cannot_be_calibrated_is_refused(network: Network) -> None:
    backbone, images = network
    with pytest.raises(QuantizationError, match="did you mean 'mse'"):
        calibrate(backbone, images, (8,), "msee", edge_bits=8)
    with pytest.raises(QuantizationError, match="33"):
        calibrate(backbone, images, (8, 33), "mse", edge_bits=8)
    with pytest.raises(QuantizationError, match="no images"):
        calibrate(backbone, images[:0], (8,), "mse", edge_bits=8)
    with pytest.raises(QuantizationError, match="evaluation mode"):
        calibrate(tiny().train(), images, (8,), "mse", edge_bits=8)


def test_layers_without_an_integer_version_are_named() -> None:
    grouped = tiny()
    grouped.stem.patch_embed.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1, groups=2).eval()
    with pytest.raises(QuantizationError, match=r"stem\.patch_embed\.conv2.*groups 2"):
        calibrate(grouped, some_images(grouped, 4), (8,), "minmax", edge_bits=8)
    block = timm.models.vision_transformer.ParallelScalingBlock
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, block_fn=block).eval()
    parallel = segment(model, (1,), "parallel")
    with pytest.raises(QuantizationError, match=r"blocks\.0: a ParallelScalingBlock"):
        calibrate(parallel, some_images(parallel, 4), (8,), "minmax", edge_bits=8)


def test_a_calibration_for_something_else_is_refused(network: Network, calibration: Calibration) -> None:
    backbone, _ = network
    with pytest.raises(QuantizationError, match=r"none at 4 bits, only at \[3, 8\]"):
        quantize_backbone(backbone, calibration, [4])
    with pytest.raises(QuantizationError, match="not quantised to 8 bits"):
        quantize_backbone(backbone, calibration, [3]).segments(0, 8)
    with pytest.raises(QuantizationError, match=r"blocks\.3.*another backbone"):
        quantize_backbone(tiny((1, 4), depth=4), calibration, [3])
    with pytest.raises(QuantizationError, match=r"blocks\.0.*calibrate again"):
        quantize_backbone(tiny(mlp_ratio=3.0), calibration, [3])
    with pytest.raises(DamagedTableError):
        Calibration.from_bytes(b"something else")
    with pytest.raises(DamagedTableError):
        Calibration.from_bytes(calibration.to_bytes()[:-100])


# The stem's own bit-width


def test_the_stem_runs_at_its_own_bits_and_its_first_layer_at_the_edge_bits(network: Network) -> None:
    backbone, images = network
    mixed = calibrate(backbone, images, (3,), "mse", edge_bits=8, stem_bits=4)
    assert set(mixed.layers[4]) == {"stem.patch_embed.conv2", "stem.patch_embed.proj"}
    assert set(mixed.layers[8]) >= {"stem.patch_embed.conv1", "final.head"}
    assert not any(name.startswith("stem") for name in mixed.layers[3])
    convolutions = [m for m in quantize_backbone(backbone, mixed, (3,)).stem.modules() if isinstance(m, QuantConv2d)]
    assert len(convolutions) == 3


def test_the_same_bits_everywhere_are_the_default(network: Network, calibration: Calibration) -> None:
    same = calibrate(*network, (3, 8), "mse", edge_bits=8, stem_bits=8)
    assert same.fingerprint() == calibration.fingerprint()
    other = calibrate(*network, (3, 8), "mse", edge_bits=8, stem_bits=3)
    assert other.fingerprint() != calibration.fingerprint()
    again = Calibration.from_bytes(other.to_bytes())
    assert (again.stem, again.edge, again.fingerprint()) == (3, 8, other.fingerprint())


def test_more_stem_bits_are_nearer_to_the_float_stem(network: Network) -> None:
    backbone, images = network
    want = backbone.stem(images)
    off = []
    for bits in (2, 4, 8):
        found = quantize_backbone(backbone, calibrate(backbone, images, (3,), "mse", edge_bits=8, stem_bits=bits), (3,))
        off.append(float((found.stem(images) - want).pow(2).mean()))
    assert off[0] > off[1] > off[2]


@pytest.mark.parametrize(("edge", "stem"), [(32, 8), (8, 32)])
def test_a_stem_is_quantised_as_a_whole_or_not(network: Network, edge: int, stem: int) -> None:
    with pytest.raises(QuantizationError, match="32 bits are for both or none"):
        calibrate(*network, (3,), "mse", edge_bits=edge, stem_bits=stem)
