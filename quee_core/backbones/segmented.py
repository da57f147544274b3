"""A vision transformer as stem, segments and output, which compose to the whole bit for bit (design, section 1)."""

from collections.abc import Sequence

import torch
from timm.layers.pool1d import global_pool_nlc
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from quee_core.errors import BackboneError

DEFAULT_EXITS = 4
POOLED_STATISTICS = 13  # of the tokens, each of d features

# What `Stem` and the two outputs restate. A subclass with its own version of one of these computes something else.
_RESTATED = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")


class Stem(nn.Module):
    """Everything before the first block: images float [n, c, h, w] to tokens float [n, t, d], prefix tokens first."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.patch_embed: nn.Module = model.patch_embed
        self.cls_token: nn.Parameter | None = model.cls_token
        self.dist_token: nn.Parameter | None = getattr(model, "dist_token", None)
        # the distilled model has no place for register tokens between its two own
        self.reg_token: nn.Parameter | None = None if self.dist_token is not None else model.reg_token
        self.pos_embed: nn.Parameter | None = model.pos_embed
        self.embeds_prefix = not model.no_embed_class
        self.pos_drop: nn.Module = model.pos_drop
        self.patch_drop: nn.Module = model.patch_drop
        self.norm_pre: nn.Module = model.norm_pre

    def forward(self, images: Tensor) -> Tensor:
        """Embed patches, put the learnt prefix tokens before them, add positions."""
        patches: Tensor = self.patch_embed(images)
        learnt = [token for token in (self.cls_token, self.dist_token, self.reg_token) if token is not None]
        prefix = [token.expand(len(patches), -1, -1) for token in learnt]
        if self.pos_embed is not None and not self.embeds_prefix:
            patches = patches + self.pos_embed
        tokens = torch.cat([*prefix, patches], dim=1) if prefix else patches
        if self.pos_embed is not None and self.embeds_prefix:
            tokens = tokens + self.pos_embed
        normed: Tensor = self.norm_pre(self.patch_drop(self.pos_drop(tokens)))
        return normed


class Segment(nn.Module):
    """The blocks between two exits: tokens float [n, t, d] to tokens of the same shape."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, tokens: Tensor) -> Tensor:
        """Run the blocks in order."""
        after: Tensor = self.blocks(tokens)
        return after


class Output(nn.Module):
    """Norm, pooling and head: tokens float [n, t, d] to logits float [n, C], or to features [n, d] without a head.

    A head that takes 2 d features sees the class token and the mean of the patch tokens, as DINOv2's linear ones do.
    """

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.pool_type: str = model.global_pool
        self.num_prefix_tokens: int = model.num_prefix_tokens
        self.pool_include_prefix: bool = model.pool_include_prefix
        self.norm: nn.Module = model.norm
        self.attn_pool: nn.Module | None = model.attn_pool
        self.fc_norm: nn.Module = model.fc_norm
        self.head_drop: nn.Module = model.head_drop
        self.head: nn.Module = model.head
        self.beside_patches = isinstance(model.head, nn.Linear) and model.head.in_features == 2 * model.embed_dim

    def forward(self, tokens: Tensor) -> Tensor:
        """Answer once for each image."""
        tokens = self.norm(tokens)
        if self.beside_patches:
            pooled = torch.cat([tokens[:, 0], tokens[:, self.num_prefix_tokens :].mean(dim=1)], dim=1)
        elif self.attn_pool is not None:
            pooled = self.attn_pool(tokens if self.pool_include_prefix else tokens[:, self.num_prefix_tokens :])
        else:
            pooled = global_pool_nlc(
                tokens,
                pool_type=self.pool_type,
                num_prefix_tokens=self.num_prefix_tokens,
                reduce_include_prefix=self.pool_include_prefix,
            )
        logits: Tensor = self.head(self.head_drop(self.fc_norm(pooled)))
        return logits


class DistilledOutput(nn.Module):
    """Output of a distilled DeiT: the mean of what its class token and its distillation token answer."""

    def __init__(self, model: VisionTransformerDistilled) -> None:
        super().__init__()
        self.norm: nn.Module = model.norm
        self.head_drop: nn.Module = model.head_drop
        self.head: nn.Module = model.head
        self.head_dist: nn.Module = model.head_dist

    def forward(self, tokens: Tensor) -> Tensor:
        """Answer once for each image."""
        tokens = self.norm(tokens)
        logits: Tensor = self.head(self.head_drop(tokens[:, 0])) + self.head_dist(self.head_drop(tokens[:, 1]))
        return logits / 2


class SegmentedBackbone(nn.Module):
    """A timm `VisionTransformer` as stem, segments and output; made by `segment`.

    The parts hold the model's own modules and parameters, not copies, so the blocks of `segments[i].blocks`
    have timm's `attn` and `mlp`. In evaluation mode `forward` equals the model's bit for bit.

    name: what the backbone is called in tables. exits: blocks that have run at each exit, strictly ascending,
    the last one all of them. image_shape: (channels, height, width) of the input. num_tokens: t. embed_dim: d.
    num_classes: C of the model's own head, 0 if it has none. num_prefix_tokens: class, distillation and
    register tokens, which come before the patch tokens. has_class_token: whether token 0 is a class token.
    grid_size: rows and columns of patch tokens.
    """

    def __init__(self, model: VisionTransformer, exits: tuple[int, ...], name: str) -> None:
        super().__init__()
        self.name = name
        self.exits = exits
        self.image_shape: tuple[int, int, int] = (model.in_chans, *model.patch_embed.img_size)
        self.embed_dim: int = model.embed_dim
        self.num_classes: int = model.num_classes
        self.num_prefix_tokens: int = model.num_prefix_tokens
        self.num_tokens: int = model.num_prefix_tokens + model.patch_embed.num_patches
        self.has_class_token: bool = model.has_class_token
        self.grid_size: tuple[int, int] = tuple(model.patch_embed.grid_size)
        self.stem = Stem(model)
        blocks = list(model.blocks)
        self.segments = nn.ModuleList(
            Segment(blocks[first:end]) for first, end in zip((0, *exits[:-1]), exits, strict=True)
        )
        self.output: nn.Module
        if isinstance(model, VisionTransformerDistilled):
            self.output = DistilledOutput(model)
        else:
            self.output = Output(model)
        theirs = set(model.modules())
        for module in self.modules():
            if module not in theirs:
                module.training = model.training

    @property
    def depth(self) -> int:
        """L, the number of exits and of segments."""
        return len(self.exits)

    @property
    def final(self) -> nn.Module | None:
        """The backbone's own answer, tokens [n, t, d] to logits [n, C]; None if it has no head."""
        return self.output if self.num_classes > 0 else None

    @property
    def attached_head_width(self) -> int | None:
        """Features that a head takes which is not the architecture's own (see `attach_head`); None if there is none."""
        return 2 * self.embed_dim if isinstance(self.output, Output) and self.output.beside_patches else None

    def forward(self, images: Tensor) -> Tensor:
        """Logits float [n, C] of images float [n, c, h, w]; without a head, the features [n, d] that timm returns."""
        tokens = self.stem(images)
        for part in self.segments:
            tokens = part(tokens)
        output: Tensor = self.output(tokens)
        return output

    @property
    def pooled_width(self) -> int:
        """Features that `pooled` gives."""
        return POOLED_STATISTICS * self.embed_dim

    def pooled(self, tokens: Tensor) -> Tensor:
        """What an exit head sees of tokens float [n, t, d]: float [n, 13 d] (design, section 4).

        The class token, or the mean of all tokens where there is none; the mean of the patch tokens; their standard
        deviation, maximum and minimum; the mean and the maximum of each quarter of the patch grid. The first two are
        the design's; behind a few blocks the class token has seen little, and the others double what a head gains
        there, at no product's cost.
        """
        summary = tokens[:, 0] if self.has_class_token else tokens.mean(dim=1)
        patches = tokens[:, self.num_prefix_tokens :]
        whole = [patches.mean(dim=1), patches.std(dim=1, unbiased=False), patches.amax(dim=1), patches.amin(dim=1)]
        grid = patches.unflatten(1, self.grid_size)
        # of an odd number, both halves have the middle row or column
        halves = [(slice(0, -(-side // 2)), slice(side // 2, side)) for side in self.grid_size]
        quarters = [grid[:, rows, columns] for rows in halves[0] for columns in halves[1]]
        return torch.cat(
            [summary, *whole, *(q.mean(dim=(1, 2)) for q in quarters), *(q.amax(dim=(1, 2)) for q in quarters)], dim=1
        )


def evenly_spaced_exits(blocks: int, count: int = DEFAULT_EXITS) -> tuple[int, ...]:
    """`count` exits as evenly spaced over `blocks` blocks as whole blocks allow; one per block if there are fewer."""
    count = min(count, blocks)
    return tuple(-(-blocks * k // count) for k in range(1, count + 1))


def check_exits(exits: Sequence[int], blocks: int, name: str) -> tuple[int, ...]:
    """`exits` as a tuple, if they cut a backbone of `blocks` blocks: ascending from 1 on, the last at the end.

    Raises BackboneError that names the first fault and the backbone `name`.
    """
    where = f"{name}: exits {list(exits)}"
    if not exits:
        example = list(evenly_spaced_exits(blocks))
        raise BackboneError(f"{where}: empty; want blocks that have run at each exit, such as {example}")
    if bad := [e for e in exits if isinstance(e, bool) or not isinstance(e, int) or e < 1]:
        raise BackboneError(f"{where}: {bad[0]!r} is not a number of blocks; want whole numbers from 1 to {blocks}")
    if beyond := [e for e in exits if e > blocks]:
        raise BackboneError(f"{where}: {beyond[0]} is beyond the backbone's depth; it has {blocks} blocks")
    if repeated := [e for k, e in enumerate(exits) if e in exits[:k]]:
        raise BackboneError(f"{where}: {repeated[0]} is repeated")
    if list(exits) != sorted(exits):
        raise BackboneError(f"{where}: out of order; want {sorted(exits)}")
    if exits[-1] != blocks:
        raise BackboneError(f"{where}: the last exit is the end of the backbone; want {[*exits, blocks]}")
    return tuple(exits)


def check_segmentable(model: nn.Module, name: str) -> VisionTransformer:
    """`model` itself, if its forward pass is one that `segment` can restate. Raises BackboneError that says why not."""
    if not isinstance(model, VisionTransformer):
        raise BackboneError(
            f"{name}: a {type(model).__name__}, not a timm VisionTransformer; only those can be cut into segments"
        )
    for method in _RESTATED:
        own = getattr(type(model), method)
        if own not in (getattr(VisionTransformer, method), getattr(VisionTransformerDistilled, method)):
            raise BackboneError(
                f"{name}: {type(model).__name__} has its own {method}(), which segments would not reproduce"
            )
    if model.dynamic_img_size:
        raise BackboneError(f"{name}: takes images of any size; create it with dynamic_img_size=False")
    if model.global_pool == "" and model.num_classes > 0:
        raise BackboneError(f"{name}: global_pool '' answers once for each token; want one answer for each image")
    return model


def segment(model: nn.Module, exits: Sequence[int], name: str) -> SegmentedBackbone:
    """The segmented view of a timm `VisionTransformer` (ViT, DeiT with or without distillation, DINOv2, SigLIP, …).

    exits: number of blocks that have run at each exit, strictly ascending; the last is the number of blocks.
    Module mode, device and gradients stay as they are in `model`, whose modules the view shares.
    Raises BackboneError if `model` is not such a transformer, or the exits do not cut it.
    """
    transformer = check_segmentable(model, name)
    return SegmentedBackbone(transformer, check_exits(exits, len(transformer.blocks), name), name)
