"""Exit heads and the views that they are trained on: seeded, the same whatever the batch, and deaf to a bad teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quee_core.config import HeadsConfig
from quee_core.data.augmentation import shifted
from quee_core.data.splits import image_count
from quee_core.errors import NumericError, ShapeMismatchError
from quee_core.features import HeadViews, head_views
from quee_core.heads import ExitHead, train_head
from quee_core.paths import FULL_PRECISION
from tests.conftest import SmallSweep

CLASSES, WIDTH = 3, 12
SETTINGS = HeadsConfig(epochs=30, batch=64, hidden=8)


def views(*, images: int = 240, teacher: str = "good", seed: int = 0) -> HeadViews:
    """Two views of clusters that a line can tell apart, and what a teacher says of them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, images)
    centres = rng.normal(size=(CLASSES, WIDTH)) * 2
    pooled = centres[labels] + rng.normal(size=(2, images, WIDTH))
    said = {"good": labels, "constant": np.full(images, 1), "none": None}[teacher]
    answers = None if said is None else 6 * np.eye(CLASSES, dtype=np.float32)[said][None]
    return HeadViews(
        (torch.from_numpy(pooled.astype(np.float32)),),
        None if answers is None else torch.from_numpy(answers),
        np.zeros(2, np.intp),
        labels,
    )


def accuracy(head: ExitHead, seen: HeadViews) -> float:
    return float((head(seen.pooled[0]).argmax(2).numpy() == seen.labels).mean())


class TestTraining:
    @pytest.mark.parametrize("teacher", ["good", "constant", "none"])
    def test_a_teacher_that_knows_nothing_is_not_listened_to(self, teacher: str) -> None:
        seen = views(teacher=teacher)
        assert accuracy(train_head(seen, 0, CLASSES, SETTINGS, WIDTH), seen) > 0.95

    def test_the_teacher_is_believed_where_it_knows(self) -> None:
        seen = views()
        seen.answers[0, :40] = torch.tensor([0.0, 6.0, 0.0])  # type: ignore[index]
        rows = slice(0, 40)
        own, taught = (
            train_head(seen, 0, CLASSES, SETTINGS.model_copy(update={"distillation": share, "epochs": 200}), WIDTH)
            for share in (0.0, 1.0)
        )
        said = [float((head(seen.pooled[0][:, rows]).argmax(2) == 1).float().mean()) for head in (own, taught)]
        assert said[1] > said[0]

    def test_the_seed_decides(self) -> None:
        def weights(**changed: Any) -> list[torch.Tensor]:
            torch.manual_seed(np.random.default_rng().integers(2**31))  # what else drew numbers does not matter
            return list(train_head(views(), 0, CLASSES, SETTINGS.model_copy(update=changed), WIDTH).parameters())

        for a, b in zip(weights(), weights(), strict=True):
            assert torch.equal(a, b)
        assert not all(torch.equal(a, b) for a, b in zip(weights(), weights(seed=1), strict=True))

    def test_training_leaves_the_callers_random_numbers_alone(self) -> None:
        torch.manual_seed(7)
        want = torch.rand(3)
        torch.manual_seed(7)
        train_head(views(), 0, CLASSES, SETTINGS, WIDTH)
        assert torch.equal(torch.rand(3), want)

    def test_without_a_hidden_layer_it_is_linear(self) -> None:
        head = train_head(views(), 0, CLASSES, SETTINGS.model_copy(update={"hidden": 0}), WIDTH)
        assert head.inner is None
        assert accuracy(head, views()) > 0.95

    def test_it_looks_at_the_first_features_alone(self) -> None:
        head = train_head(views(), 0, CLASSES, SETTINGS, 4)
        seen = views().pooled[0]
        other = seen.clone()
        other[..., 4:] = 1e6
        assert torch.equal(head(seen), head(other))

    def test_what_cannot_be_trained_on_is_refused(self) -> None:
        broken = views()
        broken.pooled[0][0, 3, 2] = torch.nan
        broken.pooled[0][1, 3, 2] = torch.nan
        with pytest.raises(NumericError, match="pooled features"):
            train_head(broken, 0, CLASSES, SETTINGS, WIDTH)
        short = views()
        with pytest.raises(ShapeMismatchError, match="labels of 3"):
            train_head(HeadViews(short.pooled, None, short.shown, short.labels[:3]), 0, CLASSES, SETTINGS, WIDTH)


class TestViews:
    def made(self, small_sweep: SmallSweep, folder: Path, batch: int = 256) -> HeadViews:
        plan = small_sweep.plan
        run = plan.config.run.model_copy(update={"batch": batch})
        plan = replace(plan, config=plan.config.model_copy(update={"run": run}))
        chosen = plan.head_images()
        folder.mkdir()
        return head_views(
            small_sweep.network.quantized, plan.batches(chosen), (2, 8, FULL_PRECISION), images=image_count(chosen),
            copies=2, mirror=True, seed=3, scratch=folder,
        )  # fmt: skip

    def test_plain_views_are_what_paths_show(self, small_sweep: SmallSweep, tmp_path: Path) -> None:
        seen = self.made(small_sweep, tmp_path / "a")
        quantized, plan = small_sweep.network.quantized, small_sweep.plan
        images = torch.cat([b.images for b in plan.batches(plan.head_images())])
        with torch.inference_mode():
            for view, bits in enumerate((2, 8, FULL_PRECISION)):
                tokens = quantized.stem(images)
                for index in range(2):
                    tokens = quantized.segments(index, bits)(tokens)
                    want = quantized.backbone.pooled(tokens)
                    torch.testing.assert_close(seen.pooled[index][view], want, rtol=1e-4, atol=1e-4)
            assert seen.answers is not None
            torch.testing.assert_close(seen.answers[0], quantized.backbone.final(tokens), rtol=1e-3, atol=1e-3)
        assert seen.shown.tolist() == [0, 0, 0, 1, 1, 2, 2]

    def test_copies_differ_and_are_drawn_by_the_seed(self, small_sweep: SmallSweep, tmp_path: Path) -> None:
        first, again = (self.made(small_sweep, tmp_path / name, batch) for name, batch in (("a", 256), ("b", 50)))
        for a, b in zip(first.pooled, again.pooled, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # the float path may round by the batch
        assert not torch.equal(first.pooled[0][3], first.pooled[0][5])
        assert not torch.equal(first.pooled[0][3], first.pooled[0][2])


class TestAugmentation:
    def images(self, n: int = 12, side: int = 28) -> torch.Tensor:
        return torch.rand(n, 2, side, side, generator=torch.Generator().manual_seed(0))

    @given(st.integers(0, 1000), st.booleans())
    def test_every_image_is_moved_by_little(self, seed: int, mirror: bool) -> None:
        images, ids = self.images(), np.arange(12) * 7
        moved = shifted(images, ids, seed, mirror=mirror)
        for image, other in zip(images, moved, strict=True):
            found = False
            for turned in (image, image.flip(2)) if mirror else (image,):
                padded = torch.nn.functional.pad(turned[None], (2, 2, 2, 2), mode="replicate")[0]
                windows = [padded[:, r : r + 28, c : c + 28] for r in range(5) for c in range(5)]
                found = found or any(torch.equal(window, other) for window in windows)
            assert found

    def test_the_id_decides_whatever_the_batch(self) -> None:
        images, ids = self.images(), np.arange(12)
        together = shifted(images, ids, 5, mirror=True)
        alone = [shifted(images[k : k + 1], ids[k : k + 1], 5, mirror=True) for k in range(12)]
        assert torch.equal(together, torch.cat(alone))

    def test_half_are_mirrored_and_shifts_are_spread(self) -> None:
        column = torch.arange(28.0).expand(1, 1, 28, 28).repeat(4000, 1, 1, 1)
        moved = shifted(column, np.arange(4000), 1, mirror=True)
        turned = moved[:, 0, 0, -1] < moved[:, 0, 0, 0]
        assert 0.45 < turned.float().mean() < 0.55
        offsets = torch.where(turned, 27 - moved[:, 0, 0, 14] - 14 + 1, moved[:, 0, 0, 14] - 14)
        assert len(offsets.unique()) >= 5
