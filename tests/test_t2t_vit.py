"""T2T-ViT has the published weights' names, shapes and costs, and computes what its definition says, term by term."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from quee_core.backbones import load_backbone, segment
from quee_core.backbones.t2t_vit import PerformerTokens, TokensToToken, TransformerTokens, positions
from quee_core.costs import backbone_macs
from quee_core.errors import BackboneError, CheckpointError
from quee_core.quantize.calibration import calibrate, quantize_backbone
from quee_core.quantize.layers import QuantAttention, QuantLinear
from quee_core.quantize.performer import QuantPerformer

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published_t2t_vit.json").read_text())


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(model: nn.Module) -> Any:
    """`model` with norms and biases away from what they are initialised to, where they would do nothing."""
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.dim() == 1:
            parameter.data += 0.3 * drawn(*parameter.shape, seed=seed)
        elif parameter.requires_grad and "token" not in name.rpartition(".")[2]:
            parameter.data += 0.05 * drawn(*parameter.shape, seed=seed)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_and_costs_are_those_of_the_published_files(name: str) -> None:
    published = PUBLISHED[name]
    model: Any = timm.create_model(name).eval()
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == published["shapes"]
    assert {key for key, tensor in model.named_parameters() if not tensor.requires_grad} == set(published["frozen"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == published["trainable"]
    assert not list(model.buffers())
    macs = backbone_macs(segment(model, range(1, len(model.blocks) + 1), name))
    found = {"tokens_to_token": macs.stem, **{f"blocks.{k}": part for k, part in enumerate(macs.segments)}}
    assert macs.final is not None
    assert {k: part.total for k, part in found.items()} | {"norm+head": macs.final.total} == published["macs"]


@pytest.mark.parametrize("wrapped", ["state_dict_ema", "state_dict", None])
def test_a_file_in_the_published_form_loads(tmp_path: Path, wrapped: str | None) -> None:
    published = moved(timm.create_model("t2t_vit_7"))
    state = {f"module.{name}" if wrapped else name: tensor for name, tensor in published.state_dict().items()}
    torch.save({wrapped: state} if wrapped else state, tmp_path / "71.7_T2T_ViT_7.pth.tar")
    loaded = load_backbone("t2t_vit_7", exits=[3, 7], checkpoint=tmp_path / "71.7_T2T_ViT_7.pth.tar")
    images = drawn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(loaded.backbone(images), published(images))
    wanted = {"input_size": (3, 224, 224), "crop_pct": 0.9, "interpolation": "bicubic"}
    assert loaded.preprocessing == wanted | {
        "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_mode": "center",
    }  # fmt: skip


def test_a_file_that_needs_more_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict_ema": timm.create_model("t2t_vit_7")}, tmp_path / "whole_model.pth.tar")
    with pytest.raises(CheckpointError, match="refused: a pickle that holds more than plain tensors"):
        load_backbone("t2t_vit_7", exits=[7], checkpoint=tmp_path / "whole_model.pth.tar")


def test_without_a_file_it_is_told_where_the_weights_are(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"on no hub, only at https://.*/81\.5_T2T_ViT_14\.pth\.tar: download them"):
        load_backbone("t2t_vit_14", exits=[14], pretrained=True, cache_dir=tmp_path)


# Arithmetic, by the definition


def test_positions_are_sines_and_cosines() -> None:
    table = positions(5, 6)
    for p in range(5):
        for j in range(6):
            angle = p / 10000 ** (2 * (j // 2) / 6)
            assert table[0, p, j].item() == pytest.approx(math.cos(angle) if j % 2 else math.sin(angle), abs=1e-6)


def test_a_performer_weighs_values_by_the_products_of_features() -> None:
    layer = moved(PerformerTokens(20))
    x = drawn(2, 7, 20, seed=5)
    key, query, value = layer.kqv(layer.norm1(x)).double().chunk(3, dim=-1)
    w, m = layer.w.double(), len(layer.w)

    def phi(u: Tensor) -> Tensor:
        return torch.exp(w @ u - u.dot(u) / 2) / math.sqrt(m)

    for image in range(2):
        for t in range(7):
            weights = torch.stack([phi(query[image, t]).dot(phi(key[image, s])) for s in range(7)])
            mean = (weights[:, None] * value[image]).sum(dim=0) / (weights.sum() + 1e-8)
            answer = value[image, t].float() + layer.proj(mean.float())
            wanted = answer + layer.mlp(layer.norm2(answer))
            assert torch.allclose(layer(x)[image, t], wanted, atol=1e-5)


def test_random_features_are_orthogonal_and_as_long_as_their_number() -> None:
    w = PerformerTokens(20).w
    assert torch.allclose(w @ w.T, len(w) * torch.eye(len(w)), atol=1e-4)


def test_a_transformer_layer_scales_scores_by_the_width_of_what_comes_in() -> None:
    layer = moved(TransformerTokens(20))
    x = drawn(2, 7, 20, seed=5)
    query, key, value = layer.attn.qkv(layer.norm1(x)).chunk(3, dim=-1)
    mean = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(20), dim=-1) @ value
    answer = value + layer.attn.proj(mean)
    assert torch.allclose(layer(x), answer + layer.mlp(layer.norm2(answer)), atol=1e-5)
    with pytest.raises(BackboneError, match="take no mask"):
        layer.attn(x, is_causal=True)


def test_windows_overlap_and_keep_their_place() -> None:
    """By hand: the first window of the first split, and one of the last, whose tokens are numbered by the map."""
    stem = TokensToToken(32, in_chans=3, embed_dim=8)
    images = drawn(1, 3, 32, 32)
    seen: list[Tensor] = []
    for layer in (stem.attention1, stem.attention2):
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    projected: list[Tensor] = []
    stem.project.register_forward_pre_hook(lambda _, given: projected.append(given[0]))
    behind: list[Tensor] = []
    stem.attention2.register_forward_hook(lambda _, __, output: behind.append(output))
    assert stem(images).shape == (1, 2 * 2, 8)
    assert [tuple(tokens.shape) for tokens in (*seen, *projected)] == [(1, 64, 147), (1, 16, 576), (1, 4, 576)]
    corner = torch.zeros(3, 7, 7)
    corner[:, 2:, 2:] = images[0, :, :5, :5]
    assert torch.equal(seen[0][0, 0], corner.flatten())
    grid = behind[0][0].T.reshape(64, 4, 4)
    last = torch.zeros(64, 3, 3)
    last[:, :3, :3] = grid[:, 1:4, 1:4]
    assert torch.equal(projected[0][0, 3], last.flatten())


def test_images_of_other_sizes() -> None:
    model = timm.create_model("t2t_vit_7", img_size=(32, 48), num_classes=5).eval()
    assert model(drawn(2, 3, 32, 48)).shape == (2, 5)
    assert resolve_model_data_config(model)["crop_pct"] == 0.9  # type: ignore[no-untyped-call]
    with pytest.raises(BackboneError, match="its tokens stand for 16 pixels a side"):
        timm.create_model("t2t_vit_7", img_size=40)


# On integers


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14"])
def test_the_stem_on_integers_is_close_and_gives_an_image_the_same_bits_in_any_batch(name: str) -> None:
    torch.manual_seed(0)
    backbone = segment(moved(timm.create_model(name, img_size=48, depth=1, num_classes=5)), [1], name)
    images = drawn(12, 3, 48, 48, seed=7)
    errors = {}
    for bits in (3, 8):
        stem = quantize_backbone(backbone, calibrate(backbone, images, (8,), "mse", edge_bits=bits), (8,)).stem
        with torch.inference_mode():
            tokens, together = backbone.stem(images), stem(images)
            assert torch.equal(stem(images[3:4]), together[3:4])
        errors[bits] = float((together - tokens).square().mean() / tokens.square().mean())
        kinds = [type(module) for module in stem.modules()]
        assert kinds.count(QuantPerformer if name == "t2t_vit_7" else QuantAttention) == 2
        assert nn.Linear not in kinds
        # kqv, proj and two layers behind them, twice; the directions of a performer; the projection
        assert kinds.count(QuantLinear) == 2 * (5 if name == "t2t_vit_7" else 4) + 1
    assert errors[8] < 0.002
    assert errors[3] > 20 * errors[8]


def test_quantised_features_answer_as_published_when_the_added_weight_counts() -> None:
    """Keys so long that their features vanish beside the 1e-8: the mean shrinks, which relative features must keep."""
    torch.manual_seed(0)
    backbone = segment(moved(timm.create_model("t2t_vit_7", img_size=32, depth=1, num_classes=5)), [1], "long")
    layer: Any = backbone.stem.patch_embed.attention1  # type: ignore[union-attr]
    layer.kqv.weight[:64] *= 3
    images = drawn(12, 3, 32, 32, seed=8)
    x = drawn(4, 9, 147, seed=9)
    key, query, _ = layer.kqv(layer.norm1(x)).chunk(3, dim=-1)
    weights = layer.features(query) @ layer.features(key).sum(dim=1).unsqueeze(2)
    assert float(weights.median()) < 1e-8
    made = calibrate(backbone, images, (8,), "mse", edge_bits=8)
    quantised: Any = quantize_backbone(backbone, made, (8,)).stem
    [first, _] = [module for module in quantised.modules() if isinstance(module, QuantPerformer)]
    with torch.inference_mode():
        wanted, got = layer(x), first(x)
    assert float((got - wanted).square().mean()) < 0.01 * float(wanted.square().mean())
