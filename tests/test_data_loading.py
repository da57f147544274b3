"""Streaming and preprocessing: every image once, in order, a bounded number at a time; the numbers that timm wants."""

import dataclasses
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torchvision.transforms import functional

from quee_core.data.datasets import ImageDataset, load_dataset
from quee_core.data.loading import Batch, image_batches
from quee_core.data.preprocessing import Preprocessing
from quee_core.data.splits import Selection
from quee_core.errors import DataError
from tests.published_files import encoded, noise, write_folder

GREY = Preprocessing((1, 28, 28), (0.286,), (0.353,), "bicubic", 1.0, "center")
COLOUR = Preprocessing((3, 32, 32), (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616), "bicubic", 1.0, "center")


@pytest.fixture(scope="module")
def folder_set(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    root = tmp_path_factory.mktemp("folder")
    write_folder(root, {"train/cat": 7, "train/dog": 6, "test/cat": 3, "test/dog": 4})
    return load_dataset("folder", root)


def small(image: Image.Image) -> Tensor:
    return functional.pil_to_tensor(image).to(torch.float32)


# Streaming


@given(
    batch_size=st.integers(1, 15),
    train=st.lists(st.integers(0, 12), max_size=20),
    test=st.lists(st.integers(0, 6), max_size=10),
)
@settings(deadline=None, max_examples=30)
def test_batches_hold_each_selected_image_once_and_in_order(folder_set, batch_size, train, test) -> None:
    selections = [Selection("train", np.array(train, np.intp)), Selection("test", np.array(test, np.intp))]
    batches = list(image_batches(folder_set, selections, small, batch_size))
    wanted = [(s.part, p) for s in selections for p in s.positions.tolist()]
    assert sum(len(batch.labels) for batch in batches) == len(wanted)
    assert all(1 <= len(batch.labels) <= batch_size for batch in batches)
    flat = [
        (image, label, sample_id)
        for batch in batches
        for image, label, sample_id in zip(batch.images, batch.labels, batch.sample_ids, strict=True)
    ]
    for (part, position), (image, label, sample_id) in zip(wanted, flat, strict=True):
        assert torch.equal(image, small(folder_set.image(part, position)))
        assert label == folder_set.labels(part)[position]
        assert sample_id == folder_set.sample_ids(part)[position]


def test_batches_have_the_stated_types() -> None:
    dataset = load_dataset("fashion_mnist")
    (batch,) = image_batches(dataset, [Selection("test", np.arange(5))], GREY.transform(), 5)
    assert (batch.images.shape, batch.images.dtype) == ((5, 1, 28, 28), torch.float32)
    assert batch.images.is_contiguous()
    assert (batch.labels.dtype, batch.sample_ids.dtype) == (np.int16, np.int64)


def test_one_batch_is_decoded_ahead_and_no_more() -> None:
    """While a batch is worked on the next is decoded, on a thread of its own, and nothing beyond it is begun."""
    dataset = load_dataset("fashion_mnist")
    decoded: list[str] = []
    second_batch = threading.Event()

    def transform(image: Image.Image) -> Tensor:
        decoded.append(threading.current_thread().name)
        if len(decoded) == 20:
            second_batch.set()
        return small(image)

    batches = image_batches(dataset, [Selection("test", np.arange(100))], transform, 10)
    next(batches)
    assert second_batch.wait(30), "the second batch was not decoded while the first was held"
    for given_out in range(2, 6):
        assert len(decoded) <= 10 * given_out
        next(batches)
    batches.close()
    assert len(decoded) <= 60
    assert all(name.startswith("quee-decode") for name in decoded)


def test_batches_are_freed_as_the_reader_goes_on() -> None:
    dataset = load_dataset("fashion_mnist")
    alive: list[weakref.ref[Batch]] = []
    most = 0
    for batch in image_batches(dataset, [Selection("test", np.arange(1000))], GREY.transform(), 50):
        alive.append(weakref.ref(batch))
        del batch
        most = max(most, sum(reference() is not None for reference in alive))
    assert len(alive) == 20
    assert most <= 2


def test_no_thread_outlives_the_iterator() -> None:
    dataset = load_dataset("fashion_mnist")
    batches = image_batches(dataset, [Selection("test", np.arange(100))], GREY.transform(), 10)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("quee-decode")]


def test_nothing_selected_gives_no_batch(folder_set: ImageDataset) -> None:
    assert list(image_batches(folder_set, [], small, 4)) == []
    assert list(image_batches(folder_set, [Selection("train", np.arange(0))], small, 4)) == []


def test_an_unreadable_image_stops_the_stream_by_name_after_the_batches_before_it(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 4, "dog": 4})
    (tmp_path / "dog" / "0001.png").write_bytes(b"no image")
    batches = image_batches(load_dataset("folder", tmp_path), [Selection("all", np.arange(8))], small, 2)
    assert len(next(batches).labels) == 2
    assert len(next(batches).labels) == 2
    with pytest.raises(DataError, match=r"dog/0001\.png: image cannot be decoded"):
        next(batches)


# Preprocessing


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_small_patch14_dinov2"])
def test_the_numbers_are_those_of_timm(model: str) -> None:
    small_input = {"img_size": 56} if "dinov2" in model else {"img_size": 64}
    config = resolve_model_data_config(timm.create_model(model, num_classes=0, depth=1, **small_input))
    ours, theirs = Preprocessing.from_data_config(config).transform(), create_transform(**config, is_training=False)
    side = config["input_size"][1]
    for seed, shape in enumerate([(80, 100), (33, 70), (side, side), (10, 10)]):
        image = Image.fromarray(noise(seed, *shape, 3))
        assert torch.equal(ours(image), theirs(image))


@pytest.mark.parametrize("preprocessing", [GREY, COLOUR])
def test_an_image_of_the_wanted_size_takes_a_shorter_way_to_the_same_numbers(preprocessing: Preprocessing) -> None:
    channels, height, width = preprocessing.size
    theirs = create_transform(preprocessing.size, mean=preprocessing.mean, std=preprocessing.std, crop_pct=1.0)
    every_value = np.resize(np.arange(256, dtype=np.uint8), (height, width, channels))
    for pixels in (every_value, noise(0, height, width, channels)):
        image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
        ours = preprocessing.transform()(image)
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs(image))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F"])
@pytest.mark.parametrize("preprocessing", [GREY, COLOUR])
def test_images_of_any_mode_and_size_become_the_wanted_shape(mode: str, preprocessing: Preprocessing) -> None:
    transform = preprocessing.transform()
    for shape in [(28, 28), (32, 32), (50, 41)]:
        tensor = transform(Image.fromarray(noise(0, *shape, 3)).convert(mode))
        assert tensor.shape == preprocessing.size
        assert tensor.dtype == torch.float32
        assert torch.isfinite(tensor).all()


def test_grey_for_a_colour_backbone_is_the_same_in_all_channels() -> None:
    pixels = noise(0, 32, 32)
    tensor = COLOUR.transform()(Image.fromarray(pixels))
    for channel in range(3):
        restored = tensor[channel] * COLOUR.std[channel] + COLOUR.mean[channel]
        np.testing.assert_allclose(restored.numpy() * 255, pixels, atol=1e-3)


def test_sixteen_bit_images_keep_their_brightness(tmp_path: Path) -> None:
    deep = np.linspace(0, 65_535, 28 * 28).reshape(28, 28).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    tensor = GREY.transform()(Image.open(tmp_path / "deep.png"))
    restored = tensor[0].numpy() * GREY.std[0] + GREY.mean[0]
    np.testing.assert_allclose(restored, deep / 65_535, atol=1 / 255)


def test_a_palette_with_transparency_is_read_without_a_warning() -> None:
    image = Image.fromarray(noise(0, 32, 32, 3)).convert("P")
    expected = COLOUR.transform()(image.copy())
    image.info["transparency"] = bytes([0, 128])
    assert torch.equal(COLOUR.transform()(image), expected)


def test_a_fingerprint_tells_every_setting_apart() -> None:
    changed = {
        "size": (3, 28, 32), "mean": (0.4914, 0.4822, 0.4466), "std": (0.247, 0.2435, 0.2617),
        "interpolation": "bilinear", "crop_pct": 0.9, "crop_mode": "squash",
    }  # fmt: skip
    assert set(changed) == {field.name for field in dataclasses.fields(Preprocessing)}
    variants = [COLOUR, *(dataclasses.replace(COLOUR, **{name: value}) for name, value in changed.items())]
    assert len({variant.fingerprint() for variant in variants}) == len(variants)
    assert dataclasses.replace(COLOUR).fingerprint() == COLOUR.fingerprint()


def test_a_jpeg_of_a_folder_reaches_the_backbone_as_float_images(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.jpg").write_bytes(encoded(np.full((60, 40, 3), 128, np.uint8), "JPEG"))
    dataset = load_dataset("folder", tmp_path)
    (batch,) = image_batches(dataset, [Selection("all", np.arange(2))], COLOUR.transform(), 8)
    expected = (128 / 255 - torch.tensor(COLOUR.mean)) / torch.tensor(COLOUR.std)
    torch.testing.assert_close(batch.images.mean(dim=(0, 2, 3)), expected, atol=1e-2, rtol=0)
