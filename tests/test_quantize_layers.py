"""Simulated layers against true integer arithmetic, bit for bit, and against themselves in other batches."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn import functional

from quee_core.errors import QuantizationError
from quee_core.quantize.layers import InParts, QuantAttention, QuantConv2d, QuantLinear, steady
from quee_core.quantize.methods import AttentionQuantizers, RelativeQuantizers
from quee_core.quantize.quantizers import ActivationQuantizer, Log2, LogRoot2, Odd, TwinUniform, Uniform, to_scale

FLOAT64_BOUND = 2**53


def of_range(bits: int, low: float = -3.0, high: float = 2.5) -> list[ActivationQuantizer]:
    """Every kind that can stand before a linear layer."""
    half = 2 ** (bits - 1)
    twin = TwinUniform(to_scale(high / ((half - 1) << 2)), -half, 0, 2, half - 1)
    return [Uniform.over(low, high, bits), Odd.over(low, high, bits), twin]


def random_integers(bits: int, *shape: int) -> Tensor:
    largest = 2 ** (bits - 1) - 1
    return torch.randint(-largest, largest + 1, shape, dtype=torch.int8)


def linear_in_integers(layer: QuantLinear, x: Tensor) -> Tensor:
    """The same layer with int64 operands and accumulators."""
    codes = layer.inputs.integers(x).to(torch.int64)
    sums = (codes[..., None, :] * layer.integers().to(torch.int64)).sum(dim=-1)
    return torch.addcmul(layer.bias, sums.float(), layer.scale)


@given(
    bits=st.sampled_from([8, 4]),
    kind=st.integers(0, 2),
    width=st.integers(1, 70),
    out=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_linear_is_what_integers_give(bits: int, kind: int, width: int, out: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = QuantLinear(
        random_integers(bits, out, width), torch.rand(out) + 0.1, torch.randn(out), of_range(bits)[kind]
    )
    x = torch.randn(3, 5, width) * 2
    assert torch.equal(layer(x), linear_in_integers(layer, x))


@pytest.mark.parametrize(("width", "parts"), [(300, 1), (700, 2), (1500, 0)])
def test_linear_stays_exact_where_float32_sums_would_not(width: int, parts: int) -> None:
    layer = QuantLinear(
        torch.full((4, width), 127, dtype=torch.int8), torch.ones(4), torch.randn(4), Uniform(1.0, 0, 255)
    )
    assert layer.parts == parts
    x = torch.full((2, width), 255.0) - torch.randint(0, 2, (2, width))
    largest = int(layer.inputs.integers(x).long().sum(dim=1).max()) * 127
    assert (largest > 2**24) == (parts != 1)
    assert largest < FLOAT64_BOUND
    assert torch.equal(layer(x), linear_in_integers(layer, x))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(3, 20, 4, stride=4, padding="valid"),
        nn.Conv2d(2, 5, (3, 2), stride=(1, 2), padding=(0, 2), dilation=(2, 1)),
        nn.Conv2d(64, 8, 7, padding=3),  # 8 bits in float32 would not be enough
    ],
)
def test_convolution_is_what_integers_give(conv: nn.Conv2d, bits: int) -> None:
    torch.manual_seed(bits)
    integers, scale = random_integers(bits, *conv.weight.shape), torch.rand(conv.out_channels) + 0.1
    correction = torch.randn(conv.out_channels)
    layer = QuantConv2d(conv, integers, scale, correction, Uniform.over(-2.0, 3.0, bits))
    images = torch.randn(5, conv.in_channels, 12, 16)
    codes = layer.inputs.integers(images).to(torch.int64)
    # int64 has no convolution: shifted slices of the padded image, one for each position in the kernel
    vertical, horizontal = (0, 0) if isinstance(conv.padding, str) else conv.padding
    padded = functional.pad(codes, (horizontal, horizontal, vertical, vertical))
    sums: Tensor | int = 0
    height, width = functional.conv2d(images, conv.weight, None, conv.stride, conv.padding, conv.dilation).shape[2:]
    for row in range(conv.kernel_size[0]):
        for column in range(conv.kernel_size[1]):
            top, left = row * conv.dilation[0], column * conv.dilation[1]
            rows = slice(top, top + (height - 1) * conv.stride[0] + 1, conv.stride[0])
            columns = slice(left, left + (width - 1) * conv.stride[1] + 1, conv.stride[1])
            sums = sums + torch.einsum("nchw,oc->nohw", padded[:, :, rows, columns], integers[:, :, row, column].long())
    assert isinstance(sums, Tensor)
    bias = correction if conv.bias is None else correction + conv.bias.detach()
    wanted = torch.addcmul(bias[:, None, None], sums.float(), layer.scale)
    assert torch.equal(layer(images), wanted)
    by_columns = layer._by_columns(layer.inputs.integers(images).to(layer.product))  # how a GPU computes it
    assert torch.equal(by_columns.long(), sums)


def softmax_quantizers(bits: int) -> list[ActivationQuantizer]:
    half = 2 ** (bits - 1)
    twin = TwinUniform(to_scale(1.0 / (half << (bits + 1))), 0, half - 1, bits + 1, half)
    return [Uniform.over(0.0, 0.7, bits), twin, Log2(min(2**bits - 2, 14)), LogRoot2.below(0.7, bits)]


def quantized_attention(bits: int, kind: int, *, relative: bool = False, **options: object) -> QuantAttention:
    attention = Attention(24, num_heads=3, qkv_bias=True, norm_layer=nn.LayerNorm, **options).eval()
    for name in ("qkv", "proj", *(["gate"] if attention.gate is not None else [])):
        linear = getattr(attention, name)
        inputs = Uniform.over(-2.0, 2.2, bits)
        scale = linear.weight.detach().abs().amax(dim=1) / (2 ** (bits - 1) - 1)
        integers = (linear.weight.detach() / scale[:, None]).round().to(torch.int8)
        setattr(attention, name, QuantLinear(integers, scale, linear.bias.detach(), inputs))
    query, key, value = [*of_range(bits)[:2], Uniform.over(-1.0, 2.0, bits)]
    operands = RelativeQuantizers if relative else AttentionQuantizers
    return QuantAttention(attention, operands(query, key, value, softmax_quantizers(bits)[kind]))


def answers_in_integers(layer: QuantAttention, scores: Tensor, values: Tensor) -> Tensor:
    """Values under the weights that scores float32 [..., q, t] give, with int64 operands and accumulators."""

    def weighted(weights: Tensor) -> Tensor:
        assert torch.equal(weights, weights.round())
        assert int(weights.max()) > 0
        return (weights.long()[..., None] * values[..., None, :, :]).sum(dim=-2).float()

    if layer.is_relative:
        weights = layer.weights.integers(torch.exp(scores - scores.amax(dim=-1, keepdim=True)))
        return weighted(weights) / weights.long().sum(dim=-1, keepdim=True).float()
    softmax = torch.softmax(scores, dim=-1)
    if isinstance(layer.weights, LogRoot2):
        even, odd = layer.weights.parts(softmax)
        return weighted(odd) * math.sqrt(2) + weighted(even)
    return weighted(layer.weights.integers(softmax))


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "scale_norm": True}, {"gated": True}])
@pytest.mark.parametrize(
    ("kind", "relative"), [(0, False), (1, False), (2, False), (3, False), (0, True), (1, True), (2, True)]
)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_attention_is_what_integers_give(bits: int, kind: int, relative: bool, options: dict[str, bool]) -> None:
    torch.manual_seed(bits)
    layer = quantized_attention(bits, kind, relative=relative, **options).requires_grad_(False)
    x = torch.randn(7, 11, 24)
    parts = linear_in_integers(layer.qkv, x).view(7, 11, 3, 3, 8).permute(2, 0, 3, 1, 4)
    q = layer.query.integers(layer.q_norm(parts[0])).long()
    k = layer.key.integers(layer.k_norm(parts[1])).long()
    v = layer.value.integers(parts[2]).long()
    scores = (q[..., :, None, :] * k[..., None, :, :]).sum(dim=-1)
    sums = answers_in_integers(layer, scores.float() * layer.score_scale, v)
    mixed = layer.norm((sums * layer.output_scale).transpose(1, 2).reshape(7, 11, 24))
    if layer.gate is not None:
        mixed = mixed * (1 / (1 + torch.exp(-linear_in_integers(layer.gate, x))))
    wanted = linear_in_integers(layer.proj, mixed)
    if layer.gate is None:
        assert torch.equal(layer(x), wanted)
    else:  # 1 / y and its reciprocal may round differently, before they are quantised
        torch.testing.assert_close(layer(x), wanted, rtol=0, atol=2 * float(layer.proj.scale.max()) * 2**bits)


def test_attention_stays_exact_over_many_tokens() -> None:
    torch.manual_seed(0)
    quantizers = AttentionQuantizers(
        Uniform.over(-1, 1, 8), Uniform.over(-1, 1, 8), Uniform.over(0, 1, 8), Uniform.over(0.0, 0.001, 8)
    )
    attention = Attention(4, num_heads=1)
    layer = QuantAttention(attention, quantizers)
    weights, values = torch.full((1, 3, 5000), 255.0), torch.full((1, 5000, 4), 255.0)
    values[0, 0] = 254
    wanted = (weights.long()[..., None] * values.long()[:, None]).sum(dim=2)
    assert int(wanted.max()) > 2**24
    assert torch.equal(layer._weighted(weights, values), wanted.float())


def test_attention_refuses_masks_and_heads_too_wide_to_be_exact() -> None:
    layer = quantized_attention(8, 0)
    with pytest.raises(QuantizationError, match="mask"):
        layer(torch.randn(1, 5, 24), is_causal=True)
    attention = Attention(600, num_heads=1)
    wide = AttentionQuantizers(*[Uniform.over(0, 1, 8)] * 4)
    with pytest.raises(QuantizationError, match="600"):
        QuantAttention(attention, wide)


@pytest.mark.parametrize(
    "activation", [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU()], ids=["gelu", "tanh", "silu"]
)
def test_a_steady_activation_treats_every_place_alike(activation: nn.Module) -> None:
    torch.manual_seed(0)
    made = steady(activation)
    assert made is not None
    x = torch.randn(40_001) * 3
    whole = made(x)
    torch.testing.assert_close(whole, activation(x), rtol=1e-5, atol=5e-6)
    for start in range(0, 300, 7):
        for size in (1, 3, 17, 31, 100):
            assert torch.equal(made(x[start : start + size].clone()), whole[start : start + size])


def test_an_activation_without_such_ends_stays() -> None:
    assert steady(nn.ReLU()) is None


@given(st.integers(0, 9), st.integers(1, 60_000))
def test_parts_give_what_the_whole_gives(images: int, image_size: int) -> None:
    seen: list[int] = []

    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return 2 * x

    x = torch.arange(images * 3.0).view(images, 3)
    part = InParts(Doubling(), image_size)
    assert torch.equal(part(x), 2 * x)
    assert max(seen) <= max(part.together, 1)
    assert sum(seen) == images
    assert len(seen) == max(1, math.ceil(images / part.together))
