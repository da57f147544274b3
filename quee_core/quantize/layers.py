"""Layers that compute on integers, simulated exactly in float32 (design, section 3).

The operands of every product are integers held in float32. Their sums stay below 2^24 in magnitude, so they are exact
in whatever order they are taken: a result depends on nothing but the image, neither on the batch that it came in nor
on threads or BLAS. Where the sums of a layer could grow beyond that, they are taken in two halves, or in float64,
which is exact up to 2^53, and then rounded to float32 once. A device that multiplies int8 fast takes integers that fit
a byte as such, into int32: the same bits, on a CPU in about a quarter of the time. One pass brings the integers back to
real values, accumulator * scale + bias (`torch.addcmul`). The activations between the layers are made of operations
that treat every element alike, wherever in a tensor it stands (`SteadyActivation`).
"""

import copy
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from timm.layers import Attention, GELUTanh, QuickGELU
from timm.layers.activations import GELU, Swish
from torch import Tensor, nn
from torch.nn import functional

from quee_core.backbones.t2t_vit import TokenAttention
from quee_core.errors import QuantizationError
from quee_core.quantize.methods import AttentionQuantizers, LinearQuantizers, NormQuantizers, RelativeQuantizers
from quee_core.quantize.quantizers import EXACT, ActivationQuantizer, LogRoot2, Uniform, to_float32

# Elements of the tokens that go through a part together, for each thread: few enough for what a block makes of them to
# stay in the cache, and enough that starting operations costs little. Three times as many or as few are slower.
_TOGETHER = 300_000

# What a GPU's products of bytes ask for: that many rows at least, and sides of the weight that are multiples.
_GPU_ROWS, _GPU_SIDES = 17, 8


class QuantLinear(nn.Module):
    """y = Q(x) Q(W)ᵀ + b: x float32 [..., in] to float32 [..., out].

    weight: integers as float32 [out, in]; inputs: quantiser of x; scale: float32 [out], the input's scale times the
    weight's; bias: float32 [out].
    """

    weight: Tensor
    weight_scale: Tensor
    scale: Tensor
    bias: Tensor
    bytes: Tensor
    offset: Tensor

    def __init__(self, integers: Tensor, weight_scale: Tensor, bias: Tensor, inputs: ActivationQuantizer) -> None:
        """integers: int8 [out, in]; weight_scale, bias: float32 [out]."""
        super().__init__()
        self.inputs = inputs
        self.out_features, self.in_features = integers.shape
        self.parts = _exact_parts(integers, inputs)
        self.register_buffer("weight", integers.to(torch.float32 if self.parts else torch.float64))
        self.register_buffer("weight_scale", weight_scale.clone())
        self.register_buffer("scale", weight_scale * inputs.scale)
        self.register_buffer("bias", bias.clone())
        self.shift = _shift_to_bytes(inputs) if self.in_features > 1 else None
        if self.shift is not None:
            offset = integers.sum(dim=1, dtype=torch.int32) * self.shift
            self.register_buffer("bytes", integers.contiguous(), persistent=False)
            self.register_buffer("offset", offset, persistent=False)

    def integers(self) -> Tensor:
        """The weight as int8 [out, in]."""
        return self.weight.to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        integers = self.inputs.integers(x)
        if self.shift is not None and self._multiplies_bytes(x.device):
            sums = self._by_bytes(integers, self.shift)
        elif self.parts == 1:
            sums = functional.linear(integers, self.weight)
        elif self.parts == 2:  # each exact, so that their sum is rounded once, as the integer would be
            half = self.in_features // 2
            sums = functional.linear(integers[..., :half], self.weight[:, :half])
            sums += functional.linear(integers[..., half:], self.weight[:, half:])
        else:
            sums = functional.linear(integers.double(), self.weight).float()
        return torch.addcmul(self.bias, sums, self.scale, out=sums)

    def _multiplies_bytes(self, device: torch.device) -> bool:
        even = device.type == "cpu" or not (self.in_features % _GPU_SIDES or self.out_features % _GPU_SIDES)
        return even and has_byte_products(device)

    def _by_bytes(self, integers: Tensor, shift: int) -> Tensor:
        if shift:
            integers.sub_(shift)
        rows = integers.to(torch.int8).reshape(-1, self.in_features).contiguous()  # a GPU takes no other
        count = len(rows)
        if rows.is_cuda and count < _GPU_ROWS:
            rows = functional.pad(rows, (0, 0, 0, _GPU_ROWS - count))
        sums = torch._int_mm(rows, self.bytes.T)[:count]
        if shift:
            sums.add_(self.offset)
        return sums.float().view(*integers.shape[:-1], self.out_features)


def quantized_linear(linear: nn.Linear, found: LinearQuantizers, name: str = "a linear layer") -> QuantLinear:
    """`linear` with the quantisers that were found for it. Raises QuantizationError if they are for another shape."""
    check_shape(found, linear.weight, name)
    bias = found.correction.to(linear.weight.device)
    if linear.bias is not None:
        bias = bias + linear.bias.detach().float()
    return QuantLinear(found.integers, found.scale, bias, found.inputs).to(linear.weight.device)


def check_shape(found: LinearQuantizers, weight: Tensor, name: str) -> None:
    """Raises QuantizationError that names the layer if `found` is for a weight of another shape."""
    wanted = (weight.shape[0], weight[0].numel())
    if found.integers.shape != wanted:
        raise QuantizationError(
            f"calibration: {name} is {wanted}, its quantisers are for {tuple(found.integers.shape)}; calibrate again"
        )


class QuantConv2d(nn.Module):
    """A quantised convolution without groups: float32 [n, c, h, w] to float32 [n, out, h', w'].

    weight: integers as float32 [out, c, kh, kw]; padding is with zeros, which the integer 0 stands for.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(
        self, conv: nn.Conv2d, integers: Tensor, weight_scale: Tensor, correction: Tensor, inputs: ActivationQuantizer
    ) -> None:
        """integers: int8 [out, c, kh, kw]; weight_scale and correction, added to the bias of `conv`: float32 [out]."""
        super().__init__()
        self.inputs = inputs
        self.stride, self.dilation = conv.stride, conv.dilation
        self.padding = (0, 0) if isinstance(conv.padding, str) else conv.padding
        self.product = torch.float32 if _exact_parts(integers, inputs) == 1 else torch.float64
        device = conv.weight.device
        bias = correction.to(device) if conv.bias is None else correction.to(device) + conv.bias.detach().float()
        self.register_buffer("weight", integers.to(device, self.product))
        self.register_buffer("scale", (weight_scale.to(device) * inputs.scale).reshape(-1, 1, 1))
        self.register_buffer("bias", bias.reshape(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        integers = self.inputs.integers(images).to(self.product)
        if integers.is_cuda:  # where a convolution may go by transforms with fractions in them, a product may not
            sums = self._by_columns(integers).float()
        else:
            sums = functional.conv2d(
                integers, self.weight, stride=self.stride, padding=self.padding, dilation=self.dilation
            ).float()
        return torch.addcmul(self.bias, sums, self.scale, out=sums)

    def _by_columns(self, integers: Tensor) -> Tensor:
        kernel = self.weight.shape[2:]
        columns = functional.unfold(integers, kernel, self.dilation, self.padding, self.stride)
        reach = [d * (k - 1) for d, k in zip(self.dilation, kernel, strict=True)]
        sides = zip(integers.shape[2:], self.padding, reach, self.stride, strict=True)
        height, width = ((side + 2 * pad - far - 1) // step + 1 for side, pad, far, step in sides)
        return torch.matmul(self.weight.flatten(1), columns).view(len(integers), -1, height, width)


class QuantAttention(nn.Module):
    """timm's `Attention` with quantised linear layers, and both products on integers: float32 [n, t, d] to the same.

    The linear layers quantise what they are given by themselves, as anywhere.
    """

    def __init__(self, attention: Attention, quantizers: AttentionQuantizers | RelativeQuantizers) -> None:
        """attention: one whose linear layers are quantised already."""
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.head_dim: int = attention.head_dim
        self.qkv: nn.Module = attention.qkv
        self.proj: nn.Module = attention.proj
        self.gate: nn.Module | None = attention.gate
        self.q_norm: nn.Module = attention.q_norm
        self.k_norm: nn.Module = attention.k_norm
        self.norm: nn.Module = attention.norm
        self.adds_values = isinstance(attention, TokenAttention)
        self.query, self.key, self.value = query, key, value = quantizers.query, quantizers.key, quantizers.value
        self.is_relative = isinstance(quantizers, RelativeQuantizers)
        self.weights = quantizers.exponentials if isinstance(quantizers, RelativeQuantizers) else quantizers.weights
        self.score_scale = to_float32(query.scale * key.scale * attention.scale)
        # where weights are relative, theirs is in the sum that answers are divided by, too
        self.output_scale = value.scale if self.is_relative else to_float32(self.weights.scale * value.scale)
        if query.largest * key.largest * self.head_dim > EXACT:
            raise QuantizationError(f"attention: heads of {self.head_dim} dimensions are too wide for exact products")

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """See the class. Neither a mask nor causality, which vision transformers don't use, is taken."""
        if attn_mask is not None or is_causal:
            raise QuantizationError("attention: a mask cannot be applied to quantised attention")
        images, tokens, _ = x.shape
        parts = self.qkv(x).view(images, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        queries, keys, values = self.q_norm(parts[0]), self.k_norm(parts[1]), parts[2]
        operands = torch.empty((3, images, self.num_heads, tokens, self.head_dim), dtype=x.dtype, device=x.device)
        self.query.integers(queries, out=operands[0])
        self.key.integers(keys, out=operands[1])
        self.value.integers(values, out=operands[2])
        q, k, v = operands.flatten(1, 2)
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(self.score_scale)
        sums = self._mixed(scores, v).view(images, self.num_heads, tokens, self.head_dim)
        mixed = torch.empty((images, tokens, self.num_heads * self.head_dim), dtype=x.dtype, device=x.device)
        torch.mul(sums.transpose(1, 2), self.output_scale, out=mixed.view(images, tokens, self.num_heads, -1))
        normed = self.norm(mixed)
        if self.gate is not None:
            normed = normed * _sigmoid(self.gate(x))
        projected: Tensor = self.proj(normed)
        return projected.add_(values.transpose(1, 2).flatten(2)) if self.adds_values else projected

    def _mixed(self, scores: Tensor, values: Tensor) -> Tensor:
        """Sums of values under the weights that `scores` give, in steps of `output_scale`; overwrites `scores`."""
        if self.is_relative:
            relative = scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_()
            attention = self.weights.integers(relative, out=relative)
            exact = attention.shape[-1] * self.weights.largest <= EXACT
            total = (attention if exact else attention.double()).sum(dim=-1, keepdim=True).float()
            return self._weighted(attention, values).div_(total)
        softmax = torch.softmax(scores, dim=-1, out=scores)
        if isinstance(self.weights, LogRoot2):
            even, odd = self.weights.parts(softmax)
            return self._weighted(odd, values).mul_(math.sqrt(2)).add_(self._weighted(even, values))
        return self._weighted(self.weights.integers(softmax, out=softmax), values)

    def _weighted(self, attention: Tensor, values: Tensor) -> Tensor:
        # a row of softmax sums to 1, and no integer is more than twice its value in steps of the scale, plus 1
        tokens = attention.shape[-1]
        rows_sum = math.inf if self.is_relative else 2 / self.weights.scale + tokens
        largest_sum = min(tokens * self.weights.largest, rows_sum)
        if largest_sum * self.value.largest <= EXACT:
            return torch.bmm(attention, values)
        return torch.bmm(attention.double(), values.double()).float()


def with_affine(norm: nn.LayerNorm, affine: NormQuantizers) -> nn.LayerNorm:
    """A copy of `norm` with another weight and bias; `norm` may be shared, and stays as it is."""
    made = copy.copy(norm)
    made._parameters = {
        name: nn.Parameter(tensor.to(norm.weight.device), requires_grad=False)
        for name, tensor in (("weight", affine.weight), ("bias", affine.bias))
    }
    return made


def replaced(module: nn.Module, name: str, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of `module` with `parts`, by name, in place of its own; whatever is not replaced is shared, not copied."""
    if name in parts:
        return parts[name]
    if not any(True for _ in module.children()):
        return module
    made = copy.copy(module)
    made._modules = {
        n: None if child is None else replaced(child, f"{name}.{n}" if name else n, parts)
        for n, child in module._modules.items()
    }
    return made


class SteadyActivation(nn.Module):
    """An activation whose result for an element does not depend on where in a tensor the element stands.

    On a CPU torch's own GELU and sigmoid take other code for the last few elements of what a thread works on, and round
    differently there. share: what x is multiplied with, out of operations that do not, from x to a new tensor. plain:
    torch's own, which is steady on a GPU, and one operation there.
    """

    def __init__(self, share: Callable[[Tensor], Tensor], plain: nn.Module) -> None:
        super().__init__()
        self.share = share
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        """x * share(x), float32 of the shape of `x`."""
        if x.is_cuda:
            activated: Tensor = self.plain(x)
            return activated
        return self.share(x).mul_(x)


def steady(activation: nn.Module) -> SteadyActivation | None:
    """What takes the place of `activation`; None for one that is not known to be unsteady."""
    if type(activation) is nn.GELU and activation.approximate == "tanh":
        return SteadyActivation(_tanh_share, activation)
    share = _SHARES.get(type(activation))
    if share is None:
        return None
    plain = copy.copy(activation)
    if isinstance(plain, nn.SiLU | Swish):
        plain.inplace = False
    return SteadyActivation(share, plain)


class InParts(nn.Module):
    """Runs `inside` on a few images at a time: float32 [n, ...] to float32 [n, ...], image by image.

    On a CPU what one operation writes is then still in the cache when the next one reads it; on a GPU all images run
    together. image_size: elements of what an image is inside, which says how many are a few.
    """

    def __init__(self, inside: nn.Module, image_size: int) -> None:
        super().__init__()
        self.inside = inside
        self.image_size = image_size

    @property
    def together(self) -> int:
        """How many images run at a time; says nothing about the result."""
        return max(1, round(_TOGETHER * torch.get_num_threads() / self.image_size))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        together = self.together
        if x.is_cuda or len(x) <= together:
            behind: Tensor = self.inside(x)
            return behind
        return torch.cat([self.inside(part) for part in torch.split(x, together)])


def _gelu_share(x: Tensor) -> Tensor:
    return x.mul(math.sqrt(0.5)).erf_().add_(1).mul_(0.5)


def _tanh_share(x: Tensor) -> Tensor:
    cubed = x.square().mul_(0.044715).add_(1).mul_(x)
    return cubed.mul_(math.sqrt(2 / math.pi)).tanh_().add_(1).mul_(0.5)


def _sigmoid(x: Tensor, slope: float = 1.0) -> Tensor:
    return x.mul(-slope).exp_().add_(1).reciprocal_()


_SHARES: Mapping[type[nn.Module], Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        nn.GELU: _gelu_share,
        GELU: _gelu_share,
        GELUTanh: _tanh_share,
        QuickGELU: lambda x: _sigmoid(x, 1.702),
        nn.SiLU: _sigmoid,
        Swish: _sigmoid,
    }
)


@functools.cache
def has_byte_products(device: torch.device) -> bool:
    """Whether a device multiplies matrices of int8 exactly and fast, as a CPU does by its VNNI instructions.

    Without those `torch._int_mm` is slow on a CPU, and in some releases sums overflowed; an old GPU refuses it. So it
    is tried once on the largest sums.
    """
    if device.type == "cpu" and not torch.cpu._is_vnni_supported():
        return False
    rows, columns = torch.full((40, 256), -128, dtype=torch.int8), torch.full((48, 256), 127, dtype=torch.int8).T
    rows[::2] = 127
    try:
        sums = torch._int_mm(rows.to(device), columns.to(device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return torch.equal(sums.cpu().long(), rows.long() @ columns.long())


def _shift_to_bytes(inputs: ActivationQuantizer) -> int | None:
    """What to take off integers of `inputs` for an int8 to hold them; None if it cannot."""
    if inputs.largest <= 127:
        return 0
    if isinstance(inputs, Uniform) and inputs.high - inputs.low <= 255:
        return inputs.low + 128
    return None


def _exact_parts(integers: Tensor, inputs: ActivationQuantizer) -> int:
    """Into how many parts, 1 or 2, integers [out, ...] must be cut for float32 sums of each to be exact; else 0."""
    magnitudes = integers.flatten(1).long().abs()
    half = magnitudes.shape[1] // 2
    halves = [int(part.sum(dim=1).max()) * inputs.largest for part in (magnitudes[:, :half], magnitudes[:, half:])]
    if int(magnitudes.sum(dim=1).max()) * inputs.largest <= EXACT:
        return 1
    return 2 if max(halves) <= EXACT else 0
