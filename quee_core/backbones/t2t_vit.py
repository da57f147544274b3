"""T2T-ViT: a vision transformer whose tokens come out of overlapping windows in three steps.

Source: L. Yuan et al., "Tokens-to-Token ViT", ICCV 2021. The arithmetic, and names and shapes of the weights, are those
of the published checkpoints, which load with `strict=True`. The tokens-to-token module stands where timm has its patch
embedding, so that everything which works on a `VisionTransformer` works on these.
"""

import math
from functools import partial
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, LayerNorm, Mlp
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional

from quee_core.backbones.checkpoints import state_dict_of
from quee_core.errors import BackboneError

TOKEN_WIDTH = 64  # of the tokens between the steps
HEAD_WIDTH = 64
STRIDE = 16  # pixels a token side stands for: 4 * 2 * 2
EPS = 1e-5  # of every LayerNorm
RANDOM_FEATURES = 32  # of the performer: half the width of its tokens
LEAST_WEIGHT = 1e-8  # added to the sum of a performer's attention weights

_Norm = partial(LayerNorm, eps=EPS)
_RELEASES = "https://github.com/yitu-opensource/T2T-ViT/releases/download/main"


class PerformerTokens(nn.Module):
    """A token layer with linear attention: float [n, t, width] to float [n, t, 64].

    k, q, v = kqv(norm1(x)); φ(u) = exp(w u - |u|² / 2) / √m with m frozen random directions w; an answer is the mean of
    v with weights φ(q) · φ(k), computed without the t x t matrix. The value, not x, is what is added to.
    """

    def __init__(self, width: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.w = nn.Parameter(torch.empty(RANDOM_FEATURES, TOKEN_WIDTH, **made), requires_grad=False)
        self.kqv = nn.Linear(width, 3 * TOKEN_WIDTH, **made)
        self.proj = nn.Linear(TOKEN_WIDTH, TOKEN_WIDTH, **made)
        self.norm1 = _Norm(width, **made)
        self.norm2 = _Norm(TOKEN_WIDTH, **made)
        self.mlp = nn.Sequential(
            nn.Linear(TOKEN_WIDTH, TOKEN_WIDTH, **made), nn.GELU(), nn.Linear(TOKEN_WIDTH, TOKEN_WIDTH, **made)
        )
        if not self.w.is_meta:
            nn.init.orthogonal_(self.w, gain=RANDOM_FEATURES**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        keys, queries, values = self.kqv(self.norm1(x)).split(TOKEN_WIDTH, dim=-1)
        answers = values + self.proj(self.attend(keys, queries, values))
        after: Tensor = answers + self.mlp(self.norm2(answers))
        return after

    def attend(self, keys: Tensor, queries: Tensor, values: Tensor) -> Tensor:
        """Mean of `values` with weights φ(q) · φ(k): float [n, t, 64] each, and the result."""
        keys, queries = self.features(keys), self.features(queries)
        weights = torch.matmul(queries, keys.sum(dim=1).unsqueeze(2))
        return torch.matmul(queries, torch.matmul(keys.transpose(1, 2), values)) / (weights + LEAST_WEIGHT)

    def features(self, x: Tensor) -> Tensor:
        """φ: float [n, t, 64] to float [n, t, m]."""
        exponents = functional.linear(x, self.w) - x.square().sum(dim=-1, keepdim=True) / 2
        return exponents.exp() / math.sqrt(len(self.w))


class TokenAttention(Attention):
    """One head of width 64 on wider tokens: float [n, t, width] to [n, t, 64]; its values are added to its answer."""

    def __init__(self, width: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(
            width, num_heads=1, attn_head_dim=TOKEN_WIDTH, dim_out=TOKEN_WIDTH, qkv_bias=False,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.scale = width**-0.5  # of the tokens that come in, as published, not of the head

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """See the class. Neither a mask nor causality, which vision transformers don't use, is taken."""
        if attn_mask is not None or is_causal:
            raise BackboneError("t2t_vit: token layers take no mask")
        queries, keys, values = self.qkv(x).split(TOKEN_WIDTH, dim=-1)
        answers = functional.scaled_dot_product_attention(queries, keys, values, scale=self.scale)
        added: Tensor = values + self.proj(answers)
        return added


class TransformerTokens(nn.Module):
    """A token layer with softmax attention: float [n, t, width] to float [n, t, 64]."""

    def __init__(self, width: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.norm1 = _Norm(width, device=device, dtype=dtype)
        self.attn = TokenAttention(width, device, dtype)
        self.norm2 = _Norm(TOKEN_WIDTH, device=device, dtype=dtype)
        self.mlp = Mlp(TOKEN_WIDTH, TOKEN_WIDTH, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        answers: Tensor = self.attn(self.norm1(x))
        after: Tensor = answers + self.mlp(self.norm2(answers))
        return after


class TokensToToken(nn.Module):
    """Images float [n, c, h, w] to tokens float [n, h / 16 * w / 16, embed_dim], in three soft splits.

    Each takes overlapping windows (7 wide in steps of 4, then twice 3 in steps of 2) as tokens; `attention1` and
    `attention2`, of the kind `layer`, stand between them. The signature is what timm's `VisionTransformer` calls.
    Raises BackboneError for a side that is no multiple of 16 pixels.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = STRIDE,
        in_chans: int = 3,
        embed_dim: int = 384,
        layer: type[PerformerTokens] | type[TransformerTokens] = PerformerTokens,
        device: Any = None,
        dtype: Any = None,
        **_unused: Any,
    ) -> None:
        super().__init__()
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if patch_size != STRIDE or min(sides) < STRIDE or any(side % STRIDE for side in sides):
            raise BackboneError(
                f"t2t_vit: patch_size {patch_size}, image size {sides}: its tokens stand for {STRIDE} pixels a side, "
                "and an image's side is a multiple of that"
            )
        self.img_size: tuple[int, ...] = sides
        self.patch_size = (STRIDE, STRIDE)
        self.grid_size = (sides[0] // STRIDE, sides[1] // STRIDE)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.attention1 = layer(in_chans * 7 * 7, device, dtype)
        self.attention2 = layer(TOKEN_WIDTH * 3 * 3, device, dtype)
        self.project = nn.Linear(TOKEN_WIDTH * 3 * 3, embed_dim, device=device, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens of `images`, row by row of the grid."""
        height, width = (side // 4 for side in images.shape[2:])
        tokens = self.attention1(functional.unfold(images, 7, padding=2, stride=4).transpose(1, 2))
        tokens = self.attention2(_split(tokens, height, width))
        projected: Tensor = self.project(_split(tokens, height // 2, width // 2))
        return projected

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels a token side stands for; asked for by timm's feature information."""
        return STRIDE if as_scalar else (STRIDE, STRIDE)


def _split(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens [n, height * width, c] as a map, and its windows of 3 x 3 in steps of 2 as tokens [n, t / 4, 9 c]."""
    grid = tokens.transpose(1, 2).unflatten(2, (height, width))
    return functional.unfold(grid, 3, padding=1, stride=2).transpose(1, 2)


class T2TVisionTransformer(VisionTransformer):
    """timm's `VisionTransformer` behind `tokens_to_token`, with a frozen table of positions."""

    def __init__(self, layer: type[PerformerTokens] | type[TransformerTokens], **settings: Any) -> None:
        super().__init__(embed_layer=partial(TokensToToken, layer=layer), norm_layer=_Norm, **settings)
        self.tokens_to_token: nn.Module = self._modules.pop("patch_embed")  # type: ignore[assignment]
        table = positions(self.patch_embed.num_patches + self.num_prefix_tokens, self.embed_dim)  # type: ignore[arg-type, operator]
        self.pos_embed = nn.Parameter(table.to(self.cls_token), requires_grad=False)

    @property
    def patch_embed(self) -> nn.Module:
        """timm's name for what makes the tokens."""
        found: nn.Module = self._modules.get("patch_embed") or self.tokens_to_token
        return found


def positions(count: int, width: int) -> Tensor:
    """The sinusoid table float32 [1, count, width]: sin at even j, cos at odd j, of p / 10000^(2 ⌊j / 2⌋ / width)."""
    even = torch.arange(width, dtype=torch.float64) // 2 * 2
    angle = torch.arange(count, dtype=torch.float64)[:, None] / 10000 ** (even / width)
    angle[:, 0::2], angle[:, 1::2] = angle[:, 0::2].sin(), angle[:, 1::2].cos()
    return angle.float().unsqueeze(0)


def _published(file: str) -> dict[str, Any]:
    return {
        "url": f"{_RELEASES}/{file}", "input_size": (3, 224, 224), "num_classes": 1000, "pool_size": None,
        "crop_pct": 0.9, "interpolation": "bicubic", "fixed_input_size": True, "license": "bsd-3-clause-clear",
        "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "classifier": "head",
        "first_conv": "tokens_to_token.attention1.kqv",
    }  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        "t2t_vit_7.in1k": _published("71.7_T2T_ViT_7.pth.tar"),
        "t2t_vit_14.in1k": _published("81.5_T2T_ViT_14.pth.tar"),
        "t2t_vit_t_14.in1k": _published("81.7_T2T_ViTt_14.pth.tar"),
    }
)


def _build(
    name: str, pretrained: bool, layer: type[PerformerTokens] | type[TransformerTokens], given: Any, **shape: Any
) -> T2TVisionTransformer:
    model: T2TVisionTransformer = build_model_with_cfg(
        T2TVisionTransformer, name, pretrained, pretrained_filter_fn=_weights_of,
        **{"layer": layer, "qkv_bias": False, "num_heads": shape["embed_dim"] // HEAD_WIDTH, **shape, **given},
    )  # fmt: skip
    return model


def _weights_of(content: Any, _model: nn.Module) -> dict[str, Tensor]:
    return state_dict_of(content, "the published weights")


@register_model
def t2t_vit_7(pretrained: bool = False, **settings: Any) -> VisionTransformer:
    """T2T-ViT-7: 4.3 M parameters, width 256, 7 blocks, performer token layers; `settings` go to timm's constructor."""
    return _build("t2t_vit_7", pretrained, PerformerTokens, settings, embed_dim=256, depth=7, mlp_ratio=2.0)


@register_model
def t2t_vit_14(pretrained: bool = False, **settings: Any) -> VisionTransformer:
    """T2T-ViT-14: 21.5 M parameters, width 384, 14 blocks, performer token layers."""
    return _build("t2t_vit_14", pretrained, PerformerTokens, settings, embed_dim=384, depth=14, mlp_ratio=3.0)


@register_model
def t2t_vit_t_14(pretrained: bool = False, **settings: Any) -> VisionTransformer:
    """T2T-ViT_t-14: 21.5 M parameters, width 384, 14 blocks, token layers with softmax attention."""
    return _build("t2t_vit_t_14", pretrained, TransformerTokens, settings, embed_dim=384, depth=14, mlp_ratio=3.0)
