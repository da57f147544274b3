"""The micro ViT: a small vision transformer with a convolutional stem, for images of 28 to 32 pixels."""

from collections.abc import Callable
from typing import Any

import torch
from timm.models import VisionTransformer, register_model
from torch import Tensor, nn

from quee_core.errors import BackboneError

STEM_STRIDE = 4


class ConvStem(nn.Module):
    """Patch embedding by three 3x3 convolutions of strides 1, 2, 2, batch-normalised but for the last.

    Maps float [n, in_chans, H, W] to tokens float [n, H / 4 * W / 4, embed_dim]. H and W must be
    multiples of 4. The signature is what timm's `VisionTransformer(embed_layer=...)` calls.
    Raises BackboneError for another patch size, or an image that is not a multiple of 4.
    """

    def __init__(
        self,
        img_size: int = 28,
        patch_size: int = STEM_STRIDE,
        in_chans: int = 1,
        embed_dim: int = 128,
        **_unused: Any,
    ) -> None:
        super().__init__()
        if patch_size != STEM_STRIDE or img_size < STEM_STRIDE or img_size % STEM_STRIDE:
            raise BackboneError(
                f"micro_vit: patch_size {patch_size}, image size {img_size}: the stem's stride is {STEM_STRIDE}, "
                "and the image's side a multiple of it"
            )
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.conv1 = nn.Conv2d(in_chans, 32, 3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.proj = nn.Conv2d(64, embed_dim, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens of `images`, row by row of the grid."""
        hidden = torch.relu(self.bn1(self.conv1(images)))
        hidden = torch.relu(self.bn2(self.conv2(hidden)))
        tokens: Tensor = self.proj(hidden).flatten(2).transpose(1, 2)
        return tokens

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels a token side stands for; asked for by timm's feature information."""
        return STEM_STRIDE if as_scalar else (STEM_STRIDE, STEM_STRIDE)


@register_model
def micro_vit(pretrained: bool = False, **overrides: Any) -> VisionTransformer:
    """A timm `VisionTransformer` of depth 8, width 128, 4 heads, class token, behind a `ConvStem`.

    `overrides` go to timm's constructor; `img_size` (default 28), `in_chans` (1) and `num_classes`
    (10) are those that data sets differ in. About 1.15 M parameters. The weights that quee ships
    are loaded by `quee_core.backbones.registry`, so `pretrained=True` is refused here with BackboneError.
    """
    if pretrained:
        raise BackboneError(
            "micro_vit: has no pretrained weights in timm; use the backbone 'micro_vit_fashion_mnist', or a checkpoint"
        )
    stem: Callable[..., nn.Module] = ConvStem
    settings: dict[str, Any] = {
        "img_size": 28, "patch_size": STEM_STRIDE, "in_chans": 1, "num_classes": 10, "embed_dim": 128,
        "depth": 8, "num_heads": 4, "mlp_ratio": 2.0, "class_token": True, "global_pool": "token",
    }  # fmt: skip
    for timm_only in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        overrides.pop(timm_only, None)
    return VisionTransformer(embed_layer=stem, **(settings | overrides))
