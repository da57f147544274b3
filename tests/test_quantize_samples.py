"""What a calibration is made of: never of nothing, however long the rows of attention are."""

import pytest
import torch
from timm.models import VisionTransformer

from quee_core.backbones.segmented import SegmentedBackbone, segment
from quee_core.errors import QuantizationError
from quee_core.quantize import capture
from quee_core.quantize.calibration import calibrate


@pytest.fixture
def tiny() -> SegmentedBackbone:
    torch.manual_seed(5)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    return segment(model.eval().requires_grad_(False), [1, 2], "tiny")


@pytest.mark.parametrize("room", [1, 16 * 2 * 17 * 5])  # scores; one image has 2 heads x 17 x 17 of them
def test_attention_over_long_rows_is_calibrated_on_some_of_its_queries(
    tiny: SegmentedBackbone, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn((16, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    whole = calibrate(tiny, images, [3], "mse", edge_bits=8)
    monkeypatch.setattr(capture, "KEPT_SCORES", room)
    some = calibrate(tiny, images, [3], "mse", edge_bits=8)
    for name in ("blocks.0.attn", "blocks.1.attn"):
        for operand in ("query", "key", "value"):
            found, wanted = (getattr(c.layers[3][name], operand) for c in (some, whole))
            assert 0.6 < found.largest * found.scale / (wanted.largest * wanted.scale) < 1.6


def test_a_calibration_on_nothing_is_refused(tiny: SegmentedBackbone) -> None:
    with pytest.raises(QuantizationError, match="no images"):
        calibrate(tiny, iter(()), [4], "mse", edge_bits=8)
