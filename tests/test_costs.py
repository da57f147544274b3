"""Counted multiply-accumulates against formulas by hand, and path costs against sums by hand."""

import math
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from quee_core.backbones import SegmentedBackbone, load_backbone, segment
from quee_core.backbones.micro_vit import micro_vit
from quee_core.costs import (
    BackboneMacs,
    CostTable,
    Macs,
    Piece,
    backbone_macs,
    bitops_table,
    edge_bits,
    full_cost,
    measured_table,
    module_macs,
    path_costs,
    relative,
)
from quee_core.errors import BackboneError, ConfigError, InvalidPathError, NumericError, ShapeMismatchError
from quee_core.paths import BIT_WIDTHS, ROOT, Path, PathTree


def small_backbone(**overrides: Any) -> SegmentedBackbone:
    return segment(micro_vit(depth=4, embed_dim=32, num_heads=2, **overrides).eval(), (1, 4), "small")


@given(
    tokens=st.integers(1, 40),
    heads=st.integers(1, 4),
    head_width=st.integers(1, 16),
    mlp_ratio=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
)
def test_a_transformer_block_by_the_formula(
    tokens: int, heads: int, head_width: int, mlp_ratio: int, bias: bool
) -> None:
    width = heads * head_width
    block = timm.models.vision_transformer.Block(width, heads, mlp_ratio=mlp_ratio, qkv_bias=bias, proj_bias=bias)
    macs = module_macs(block, torch.zeros(3, tokens, width))
    assert macs.linear == tokens * width * width * (
        3 + 1 + 2 * mlp_ratio
    )  # q, k, v; projection; both layers of the MLP
    assert macs.attention == 2 * tokens * tokens * width  # q kᵀ and its product with v, all heads together
    assert module_macs(block, torch.zeros(1, tokens, width)) == macs


def test_every_piece_of_the_micro_vit_by_the_formula() -> None:
    macs = backbone_macs(segment(micro_vit().eval(), (2, 4, 6, 8), "micro_vit"))
    side, tokens, width = 28, 7 * 7 + 1, 128
    stem = side**2 * 1 * 32 * 9 + (side // 2) ** 2 * 32 * 64 * 9 + (side // 4) ** 2 * 64 * width * 9
    assert macs.stem == Macs(linear=stem, attention=0)
    block = Macs(linear=tokens * width * width * (4 + 2 * 2), attention=2 * tokens**2 * width)
    assert macs.segments == (Macs(2 * block.linear, 2 * block.attention),) * 4
    assert macs.final == Macs(linear=width * 10, attention=0)


def test_attention_pooling_counts_its_products_as_attention() -> None:
    model = timm.create_model(
        "vit_base_patch16_siglip_224", img_size=32, depth=1, embed_dim=64, num_heads=2, num_classes=7
    )
    final = backbone_macs(segment(model, (1,), "siglip")).final
    assert final is not None
    assert final.attention == 2 * 1 * 4 * 64
    assert final.linear == 64 * 64 + 4 * 64 * 128 + 64 * 64 + 2 * 64 * 256 + 64 * 7


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 2}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 2}),
        ("vit_base_patch16_clip_quickgelu_224", {"img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 2}),
        ("vit_tiny_r_s16_p8_224", {"img_size": 64, "depth": 2}),
        ("test_vit4", {"img_size": 64, "dynamic_img_size": False}),
    ],
)
def test_the_pieces_add_up_to_the_whole_model(name: str, settings: dict[str, Any]) -> None:
    model: Any = timm.create_model(name, **settings).eval()
    backbone = segment(model, (len(model.blocks),), name)
    macs = backbone_macs(backbone)
    pieces = [
        macs.stem,
        *macs.segments,
        module_macs(backbone.output, torch.zeros(1, backbone.num_tokens, backbone.embed_dim)),
    ]
    whole = module_macs(model, torch.zeros(1, *backbone.image_shape))
    assert sum(piece.total for piece in pieces) == whole.total
    assert sum(piece.attention for piece in pieces) == whole.attention > 0


def test_counting_leaves_the_module_as_it_was() -> None:
    backbone = small_backbone().train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    module_macs(backbone, torch.zeros(1, 1, 28, 28))
    assert backbone.training
    assert all(p.device.type == "cpu" and p.requires_grad for p in backbone.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


class _Sorting(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        ordered: Tensor = values.sort(dim=-1).values
        return ordered


class _Transform(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        transformed: Tensor = torch.fft.fft(values).real
        return transformed


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (nn.Sequential(nn.Linear(8, 8), _Sorting()), r"_Sorting \(Sequential\.1\) runs aten\.sort"),
        (_Transform(), r"_Transform \(_Transform\) runs aten\._fft"),
    ],
)
def test_arithmetic_of_unknown_cost_is_named_never_counted_as_nothing(module: nn.Module, says: str) -> None:
    with pytest.raises(BackboneError, match=says):
        module_macs(module, torch.zeros(2, 8))


@pytest.mark.parametrize(("bits", "edge"), [((2, 4, 32), 8), ((8,), 8), ((3,), 8), ((8, 32), 8), ((32,), 32)])
def test_stem_and_heads_run_at_8_bits_unless_there_are_only_more(bits: tuple[int, ...], edge: int) -> None:
    assert edge_bits(bits) == edge
    backbone = small_backbone()
    macs = backbone_macs(backbone)
    table = bitops_table(macs, [50, None], bits)
    assert table.unit == "bitops"
    assert table.stem == macs.stem.total * edge**2
    assert macs.final is not None
    assert table.heads == (50 * edge**2, macs.final.total * edge**2)
    assert table.segments == {b: tuple(part.total * b * b for part in macs.segments) for b in bits}
    assert bitops_table(backbone, [50, None], bits) == table


@pytest.mark.parametrize(
    ("num_classes", "heads", "error", "says"),
    [
        (10, [5], ShapeMismatchError, "1 heads and 2 segments"),
        (10, [None, 5], BackboneError, "only the last exit"),
        (0, [5, None], BackboneError, "only if the backbone has one"),
    ],
)
def test_heads_that_do_not_match_the_backbone(
    num_classes: int, heads: list[int | None], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        bitops_table(small_backbone(num_classes=num_classes), heads, (4, 8))


costs = st.floats(0, 1e15)


@st.composite
def cost_tables(draw: st.DrawFn) -> CostTable:
    depth = draw(st.integers(1, 5))
    bits = draw(st.sets(st.sampled_from(BIT_WIDTHS), min_size=1, max_size=4))
    row = st.lists(costs, min_size=depth, max_size=depth).map(tuple)
    return CostTable(
        unit=draw(st.sampled_from(["bitops", "milliseconds"])),
        stem=draw(costs),
        segments={b: draw(row) for b in bits},
        heads=draw(row),
        gates=draw(row),
        batch_size=draw(st.none() | st.integers(1, 512)),
    )


def cost_by_hand(table: CostTable, path: Path, evaluated: Literal["final", "every"]) -> float:
    total = table.stem
    if evaluated == "every":
        total += table.gates[0]
    for exit_, bits in enumerate(path.bits, start=1):
        total += table.segments[bits][exit_ - 1]
        if evaluated == "every":
            total += table.heads[exit_ - 1]
            if exit_ < table.depth:
                total += table.gates[exit_]
    return total if evaluated == "every" else total + table.heads[path.exit - 1]


@given(cost_tables(), st.sampled_from(["final", "every"]))
def test_path_costs_by_hand(table: CostTable, evaluated: Literal["final", "every"]) -> None:
    tree = PathTree.of(table.bits, table.depth, "monotone")
    by_hand = [cost_by_hand(table, path, evaluated) for path in tree.paths]
    np.testing.assert_allclose(path_costs(table, tree.paths, evaluated=evaluated), by_hand, rtol=1e-12)
    backwards = path_costs(table, tree.paths[::-1], evaluated=evaluated)
    np.testing.assert_array_equal(backwards[::-1], path_costs(table, tree.paths, evaluated=evaluated))


@given(cost_tables())
def test_text_reads_back_as_an_equal_table(table: CostTable) -> None:
    assert CostTable.from_json(table.to_json()) == table


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"unit": "bitops"}', '{"segments": 3}', '{"segments": {"x": [1]}}'])
def test_text_that_is_no_table(text: str) -> None:
    with pytest.raises(ConfigError, match="not a cost table"):
        CostTable.from_json(text)


TABLE = CostTable("bitops", 1.0, {4: (2.0, 3.0), 8: (8.0, 12.0)}, heads=(0.5, 0.25), gates=(0.0, 0.0))


def test_gates_are_paid_only_where_they_are_evaluated() -> None:
    gated = TABLE.with_gates([0.1, 0.01])
    paths = [Path((4,)), Path((8, 4))]
    np.testing.assert_allclose(path_costs(gated, paths, evaluated="every"), [3.5 + 0.11, 12.75 + 0.11])
    np.testing.assert_allclose(path_costs(gated, paths, evaluated="final"), [3.5, 12.25])
    assert TABLE.gates == (0.0, 0.0)
    with pytest.raises(ShapeMismatchError, match="1 gates and 2 heads"):
        TABLE.with_gates([0.1])


def test_relative_cost_1_is_the_full_path_at_the_trees_highest_bit_width() -> None:
    for bits, full in (((4, 8), 21.25), ((4,), 6.25)):
        tree = PathTree.of(bits, 2, "full")
        assert full_cost(TABLE, tree) == full
        shares = relative(path_costs(TABLE, tree.paths, evaluated="final"), TABLE, tree)
        assert shares[tree.index[Path((max(bits),) * 2)]] == 1
        assert shares.max() == 1
    free = CostTable("bitops", 0.0, {4: (0.0,)}, heads=(0.0,), gates=(0.0,))
    with pytest.raises(NumericError, match="full path costs nothing"):
        relative(np.ones(1), free, PathTree.of((4,), 1, "full"))


@pytest.mark.parametrize("path", [ROOT, Path((4, 8, 4)), Path((2,)), Path((4, 32))])
def test_a_path_without_costs(path: Path) -> None:
    with pytest.raises(InvalidPathError, match=f"path {path}: no cost for it"):
        path_costs(TABLE, [Path((4,)), path], evaluated="final")


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: CostTable("bitops", math.nan, {4: (1.0,)}, (1.0,), (0.0,)), NumericError, "the stem costs nan"),
        (lambda: CostTable("bitops", 1.0, {4: (-1.0,)}, (1.0,), (0.0,)), NumericError, "segment 1 at 4 bits costs -1"),
        (lambda: CostTable("bitops", 1.0, {4: (1.0,)}, (math.inf,), (0.0,)), NumericError, "head 1 costs inf"),
        (lambda: CostTable("bitops", 1.0, {4: (1.0, 2.0)}, (1.0,), (0.0,)), ShapeMismatchError, "2 segments at 4 bits"),
        (lambda: CostTable("bitops", 1.0, {5: (1.0,)}, (1.0,), ()), ShapeMismatchError, "0 gates and 1 heads"),
        (lambda: CostTable("bitops", 1.0, {33: (1.0,)}, (1.0,), (0.0,)), InvalidPathError, "33"),
        (lambda: CostTable("bitops", 1.0, {}, (1.0,), (0.0,)), InvalidPathError, "empty"),
        (
            lambda: bitops_table(BackboneMacs(Macs(1, 0), Macs(1, 0), (Macs(1, 0),), None), [1], ()),
            InvalidPathError,
            "empty",
        ),
    ],
)
def test_impossible_tables(build: Callable[[], CostTable], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build()


def test_measured_time_of_real_pieces_fills_the_same_table() -> None:
    backbone = small_backbone()
    images = torch.randn(16, *backbone.image_shape)
    tokens = backbone.stem(images).detach()
    asked: list[Piece] = []

    def prepare(piece: Piece) -> Callable[[], object]:
        asked.append(piece)
        module = {"stem": backbone.stem, "segment": backbone.segments[piece.index - 1], "head": backbone.output}[
            piece.kind
        ]
        return torch.inference_mode()(lambda: module(images if piece.kind == "stem" else tokens))

    table = measured_table(prepare, bits=(8, 4), depth=2, batch_size=16)
    assert set(asked) == {
        Piece("stem", 0, 8),
        *(Piece("segment", k, b) for k in (1, 2) for b in (4, 8)),
        Piece("head", 1, 8),
        Piece("head", 2, 8),
    }
    assert len(asked) == len(set(asked))
    assert (table.unit, table.batch_size, table.bits, table.gates) == ("milliseconds", 16, (4, 8), (0.0, 0.0))
    assert all(cost > 0 for row in table.segments.values() for cost in row)
    assert full_cost(table, PathTree.of((4, 8), 2, "uniform")) > 0


def test_each_piece_gets_its_own_time() -> None:
    def seconds(piece: Piece) -> float:
        return {"stem": 0.001, "segment": 0.01 * piece.index * piece.bits / 4, "head": 0.03 * piece.index}[piece.kind]

    table = measured_table(
        lambda piece: lambda: time.sleep(seconds(piece)), bits=(4, 8), depth=2, batch_size=1, repeats=3, warm_up=0
    )
    # a sleep never ends early, so a time that landed in a dearer piece's place would be too short
    for bits in (4, 8):
        for k in (1, 2):
            assert table.segments[bits][k - 1] >= 1e3 * seconds(Piece("segment", k, bits))
    assert all(cost >= 1e3 * seconds(Piece("head", k, 8)) for k, cost in enumerate(table.heads, 1))
    assert table.stem >= 1e3 * seconds(Piece("stem", 0, 8))


def test_measured_time_is_the_median_per_image_after_warm_up() -> None:
    calls = 0

    def slow_twice() -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.06 if calls in (1, 3) else 0.004)  # in the warm-up, and as an outlier

    def prepare(piece: Piece) -> Callable[[], object]:
        return slow_twice if piece.kind == "segment" else dict

    table = measured_table(prepare, bits=(4,), depth=1, batch_size=2, repeats=5, warm_up=1)
    assert calls == 6
    assert 2.0 <= table.segments[4][0] < 20


def test_the_device_has_finished_before_and_after_each_run() -> None:
    events: list[str] = []
    measured_table(
        lambda piece: lambda: events.append(piece.kind),
        bits=(4,), depth=1, batch_size=1, repeats=1, warm_up=0, synchronize=lambda: events.append("wait"),
    )  # fmt: skip
    assert events == ["wait", "stem", "wait", "wait", "segment", "wait", "wait", "head", "wait"]


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"batch_size": 0}, {"repeats": 0}, {"warm_up": -1}])
def test_measurements_that_measure_nothing(wrong: dict[str, int]) -> None:
    settings: dict[str, Any] = {"depth": 1, "batch_size": 1, "repeats": 1, "warm_up": 0} | wrong
    with pytest.raises(ConfigError, match="want at least 1, 1, 1 and 0"):
        measured_table(lambda _: dict, bits=(4,), **settings)


def test_the_stem_costs_by_its_own_bits() -> None:
    """Its first layer, which sees the image, by those of the edge: as the calibration has it."""
    backbone = load_backbone("micro_vit_fashion_mnist").backbone
    macs = backbone_macs(backbone)
    assert macs.first.total == 28 * 28 * 9 * 32
    assert macs.first.total + macs.behind_first.total == macs.stem.total
    heads = [100] * (backbone.depth - 1) + [None]
    table = bitops_table(macs, heads, (2, 4), edge=6, stem=4)
    assert table.stem == macs.first.total * 36 + macs.behind_first.total * 16
    assert bitops_table(macs, heads, (2, 4), edge=6).stem == macs.stem.total * 36
    assert bitops_table(macs, heads, (2, 4)).stem == macs.stem.total * 64
