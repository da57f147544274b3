"""Blocks fitted as a whole: each step against its definition, and the whole against layers judged one by one."""

import copy
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import LayerNorm
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from quee_core.backbones import SegmentedBackbone, load_backbone, segment
from quee_core.data.datasets import load_dataset
from quee_core.data.loading import image_batches
from quee_core.data.preprocessing import Preprocessing
from quee_core.data.splits import Selection
from quee_core.errors import NumericError
from quee_core.quantize.blocks import is_plain, token_weights
from quee_core.quantize.calibration import Calibration, calibrate, quantize_backbone
from quee_core.quantize.erq import round_by_halves
from quee_core.quantize.methods import QUANT_METHODS, NormQuantizers, ridge, round_in_turn
from quee_core.quantize.moments import Moments
from quee_core.quantize.quantizers import WeightGrid, real
from quee_core.quantize.refinement import refined, rescaled
from quee_core.quantize.repq import channel_ranges, reparametrized

FITTED = sorted(name for name, method in QUANT_METHODS.items() if method.blocks is not None)
SEEDS = st.integers(0, 2**31)

Images = tuple[SegmentedBackbone, Tensor, Tensor, Tensor]


def normed_rows(seed: int, width: int = 24) -> tuple[nn.LayerNorm, Tensor, Tensor]:
    """A LayerNorm whose channels differ a hundredfold, the weight behind it, and what the norm is given."""
    generator = torch.Generator().manual_seed(seed)
    norm = nn.LayerNorm(width).requires_grad_(False)
    norm.weight.copy_(torch.exp(1.5 * torch.randn(width, generator=generator)))
    norm.bias.copy_(3 * torch.randn(width, generator=generator))
    weight = torch.randn(10, width, generator=generator)
    return norm, weight, 2 * torch.randn(600, width, generator=generator)


def correlated(seed: int, rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) @ torch.randn(width, width, generator=generator) / width**0.5


@given(SEEDS, st.sampled_from([2, 3, 4, 8]))
def test_one_quantiser_behind_the_changed_norm_is_one_for_each_channel(seed: int, bits: int) -> None:
    norm, weight, x = normed_rows(seed)
    made = reparametrized(norm, weight, norm(x), bits)
    changed = nn.LayerNorm(24).requires_grad_(False)
    changed.load_state_dict({"weight": made.norm.weight, "bias": made.norm.bias})
    got = real(made.inputs, changed(x)) @ made.weight.T - weight @ made.shift
    low, step = channel_ranges(norm(x), bits)
    by_channel = (((norm(x) - low) / step).round().clamp(0, 2**bits - 1) * step + low) @ weight.T
    # a value amid two levels may fall the other way, for the two round differently before they quantise
    alike = (got - by_channel).abs().amax(dim=1) < 1e-3 * by_channel.abs().amax()
    assert float(alike.float().mean()) > 0.97
    torch.testing.assert_close(
        changed(x) @ made.weight.T - weight @ made.shift, norm(x) @ weight.T, rtol=1e-3, atol=1e-3
    )


@given(SEEDS, st.sampled_from([2, 3, 4]))
def test_a_range_for_each_channel_errs_less_than_one_for_all(seed: int, bits: int) -> None:
    norm, _, x = normed_rows(seed)
    rows = norm(x)
    low, step = channel_ranges(rows, bits)
    by_channel = ((rows - low) / step).round().clamp(0, 2**bits - 1) * step + low
    start, whole = rows.min(), (rows.max() - rows.min()) / (2**bits - 1)
    together = ((rows - start) / whole).round() * whole + start
    assert float((by_channel - rows).square().sum()) < float((together - rows).square().sum())


@given(SEEDS, st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_sums_over_batches_are_those_of_all_rows_at_once(seed: int, batches: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = sum(batches)
    x, y = torch.randn(images, 7, 5, generator=generator) + 2, torch.randn(images, 7, 3, generator=generator) - 1
    weights = (torch.rand(7, generator=generator) + 0.1).double()
    moments = Moments(5, 3, x.device)
    for part_x, part_y in zip(x.split(batches), y.split(batches), strict=True):
        moments.add(part_x, part_y, weights)
    share = weights.expand(images, 7).flatten() / (images * weights.sum())
    rows_x, rows_y = x.flatten(0, 1).double(), y.flatten(0, 1).double()
    mean_x, mean_y = share @ rows_x, share @ rows_y
    wanted = (rows_x - mean_x).T @ ((rows_x - mean_x) * share[:, None])
    cross = (rows_y - mean_y).T @ ((rows_x - mean_x) * share[:, None])
    for got, known in zip((*moments.means, *moments.centred()), (mean_x, mean_y, wanted, cross), strict=True):
        torch.testing.assert_close(got, known, rtol=1e-9, atol=1e-9)


@given(SEEDS, st.integers(1, 30), st.floats(1e-3, 10))
def test_the_ridge_correction_never_raises_the_error_on_calibration_rows(
    seed: int, width: int, strength: float
) -> None:
    rows = correlated(seed, 200, width)
    weight = torch.randn(6, width, generator=torch.Generator().manual_seed(seed))
    given_rows = (2 * rows).round() / 2
    moment = given_rows.T @ given_rows / len(rows)
    missing = weight @ (rows - given_rows).T @ given_rows / len(rows)
    corrected = weight + ridge(missing, moment, strength)

    def error(candidate: Tensor) -> float:
        return float((given_rows @ candidate.T - rows @ weight.T).square().sum())

    assert error(corrected) <= (1 + 1e-5) * error(weight) + 1e-9


@given(SEEDS, st.sampled_from([2, 3, 4]), st.integers(1, 40), st.booleans())
def test_each_refinement_of_a_rounding_gains_and_so_does_its_scale(seed: int, bits: int, width: int, odd: bool) -> None:
    weight = torch.randn(8, width, generator=torch.Generator().manual_seed(seed))
    rows = correlated(seed, 300, width) + 0.5
    moment = rows.T @ rows / len(rows)
    grid = WeightGrid(weight.abs().amax(dim=1) / 2**bits, bits, odd)
    nearest = grid.integers(weight)
    levels = refined(nearest, weight, grid, moment)

    def errors(integers: Tensor) -> Tensor:
        wrong = integers * grid.scale[:, None] - weight
        return ((wrong @ moment) * wrong).sum(dim=1)

    assert bool((errors(levels) <= errors(nearest) * (1 + 1e-4) + 1e-6).all())
    assert bool((levels.abs() <= grid.largest).all())
    assert set(((levels - nearest) % (2 if odd else 1)).flatten().tolist()) == {0.0}
    scaled = rescaled(grid, levels, weight, moment)
    wrong = levels * scaled.scale[:, None] - weight
    assert bool((((wrong @ moment) * wrong).sum(dim=1) <= errors(levels) * (1 + 1e-4) + 1e-6).all())
    assert bool((scaled.scale > 0).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_by_halves_errs_less_than_rounding_to_nearest(bits: int) -> None:
    weight = torch.randn(16, 37, generator=torch.Generator().manual_seed(bits))
    rows = correlated(bits, 500, 37)
    moment = rows.T @ rows / len(rows)
    grid = WeightGrid(weight.abs().amax(dim=1) / (2**bits - 1), bits, odd=True)

    def error(integers: Tensor) -> float:
        wrong = integers * grid.scale[:, None] - weight
        return float(((wrong @ moment) * wrong).sum())

    by_halves, nearest = error(round_by_halves(weight, grid, moment)), error(grid.integers(weight))
    assert by_halves < 0.8 * nearest
    assert by_halves < 1.5 * error(round_in_turn(weight, grid, moment))


def test_a_class_token_counts_as_the_square_root_of_the_patches() -> None:
    assert token_weights(torch.zeros(1, 50, 2), 1).tolist() == [7.0] + [1.0] * 49
    assert token_weights(torch.zeros(1, 16, 2), 0).tolist() == [1.0] * 16


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, True),
        ({"init_values": 1e-5, "qk_norm": True, "norm_layer": LayerNorm}, True),
        ({"scale_attn_norm": True}, False),
        ({"scale_mlp_norm": True}, False),
    ],
)
def test_what_a_plain_block_is(options: dict[str, Any], plain: bool) -> None:
    assert is_plain(Block(16, 2, **options)) == plain
    assert not is_plain(nn.Linear(4, 4))


@pytest.fixture(scope="module")
def bundled() -> Images:
    """The bundled backbone, 192 calibration images, 400 held-out ones and their labels."""
    loaded, dataset = load_backbone("micro_vit_fashion_mnist", exits=[4, 8]), load_dataset("fashion_mnist")
    transform = Preprocessing.from_data_config(loaded.preprocessing).transform()
    selected = [Selection("train", np.arange(0, 192)), Selection("heldout", np.arange(0, 400))]
    seen, new = (next(iter(image_batches(dataset, [part], transform, 400))) for part in selected)
    return loaded.backbone, seen.images, new.images, torch.from_numpy(new.labels).long()


@pytest.fixture(scope="module")
def calibrations(bundled: Images) -> dict[str, Calibration]:
    backbone, images, _, _ = bundled
    return {method: calibrate(backbone, images, (2,), method, edge_bits=8) for method in ("mse", *FITTED)}


@torch.inference_mode()
def stages(backbone: SegmentedBackbone, calibration: Calibration, images: Tensor, bits: int = 2) -> list[Tensor]:
    """Tokens behind the stem and every segment at one bit-width, then the answer."""
    quantized = quantize_backbone(backbone, calibration, [2])
    assert quantized.final is not None
    parts = [quantized.segments(index, bits) for index in range(backbone.depth)]
    return list(
        accumulate([*parts, quantized.final], lambda tokens, part: part(tokens), initial=quantized.stem(images))
    )


def test_compensation_lowers_the_error_of_tokens_and_answers_on_new_images(
    bundled: Images, calibrations: dict[str, Calibration]
) -> None:
    backbone, _, images, labels = bundled
    wanted, alone, fitted = (
        stages(backbone, calibrations[method], images, bits)
        for method, bits in (("mse", 32), ("mse", 2), ("compensated", 2))
    )
    errors = [
        [float((got - known).square().mean()) for got, known in zip(of, wanted, strict=True)] for of in (alone, fitted)
    ]
    assert all(ours < 0.9 * theirs for theirs, ours in zip(errors[0][1:], errors[1][1:], strict=True))
    right = [int((of[-1].argmax(dim=1) == labels).sum()) for of in (alone, fitted)]
    assert right[1] >= right[0]


@pytest.mark.parametrize("method", FITTED)
def test_the_norm_that_all_exits_share_stays(
    bundled: Images, calibrations: dict[str, Calibration], method: str
) -> None:
    backbone, _, images, _ = bundled
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    changed = {name for name, found in calibrations[method].layers[2].items() if isinstance(found, NormQuantizers)}
    assert changed == {f"blocks.{k}.norm{i}" for k in range(8) for i in (1, 2)}
    quantized = quantize_backbone(backbone, calibrations[method], [2])
    final: Any = quantized.final
    output: Any = backbone.output
    assert final.norm is output.norm
    stages(backbone, calibrations[method], images[:8])
    after = backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def tiny() -> SegmentedBackbone:
    torch.manual_seed(5)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    return segment(model.eval().requires_grad_(False), (1, 2), "tiny")


def noise(images: int) -> Tensor:
    return torch.randn((images, 3, 16, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", FITTED)
def test_the_same_images_give_the_same_calibration_whatever_else_is_asked(tiny: SegmentedBackbone, method: str) -> None:
    made = calibrate(tiny, noise(40), (2,), method, edge_bits=8)
    again = calibrate(tiny, iter(noise(40).split(7)), (2, 4), method, edge_bits=8)
    assert again.fingerprint_of(2) == made.fingerprint_of(2)


@pytest.mark.parametrize("method", FITTED)
def test_a_layer_whose_values_are_not_finite_is_named(tiny: SegmentedBackbone, method: str) -> None:
    broken = copy.deepcopy(tiny)
    broken.segments[1].blocks[0].mlp.fc1.bias.data[3] = torch.nan
    with pytest.raises(NumericError, match=r"blocks\.1\.mlp\.fc2"):
        calibrate(broken, noise(8), (3,), method, edge_bits=8)


@pytest.mark.parametrize("method", FITTED)
def test_a_block_that_is_not_plain_is_treated_as_by_mse(method: str) -> None:
    torch.manual_seed(5)
    blocks = {"block_fn": ResPostBlock, "img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    backbone = segment(VisionTransformer(**blocks).eval().requires_grad_(False), (1, 2), "post-norm")
    ours, theirs = (calibrate(backbone, noise(24), (3,), name, edge_bits=8) for name in (method, "mse"))
    assert ours.fingerprint_of(3) == theirs.fingerprint_of(3)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("part", ["attn.qkv.weight", "mlp.fc1.weight", "norm2.weight", "norm1.weight"])
@pytest.mark.parametrize("method", FITTED)
def test_a_layer_that_says_the_same_of_every_image_is_fitted_too(
    tiny: SegmentedBackbone, method: str, part: str, bits: int
) -> None:
    """As in pruned or collapsed blocks: what it lacks in variance must not be made up of rounding errors."""
    constant = copy.deepcopy(tiny)
    block = constant.segments[0].blocks[0]
    block.get_parameter(part).data.zero_()
    block.get_parameter(part.replace("weight", "bias")).data.uniform_(
        0.1, 3, generator=torch.Generator().manual_seed(0)
    )
    made = quantize_backbone(constant, calibrate(constant, noise(8), (bits,), method, edge_bits=8), [bits])
    tokens = constant.stem(noise(4))
    quantized, known = made.segments(0, bits)(tokens), constant.segments[0](tokens)
    assert float((quantized - known).square().mean()) < float(known.square().mean())
