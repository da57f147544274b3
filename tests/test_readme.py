"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from quee_core.config import parse_config
from quee_core.deployment import load_router
from tests.test_deployment import Saved, copied, saved  # noqa: F401 (a fixture)

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_every_sweep_shown_is_a_valid_one() -> None:
    assert blocks("yaml")
    for text in blocks("yaml"):
        parse_config(yaml.safe_load(text), source="README.md")


def test_the_python_shown_routes_an_image(
    saved: Saved,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    copied(saved, tmp_path / "runs" / "mine" / "router")
    Image.new("RGB", (40, 30), (200, 30, 90)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    seen: dict[str, object] = {}
    exec(code, seen)
    names = load_router("runs/mine/router").manifest.class_names
    assert int(seen["routed"].label[0]) < len(names)  # type: ignore[attr-defined]


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"\b(TIME|REPEAT|TODO|XXX|FIXME)\b", README)


def test_its_pictures_are_there_and_small() -> None:
    pictures = re.findall(r"!\[[^\]]{20,}\]\((docs/[\w-]+\.png)\)", README)
    assert len(pictures) == README.count("![") > 0
    for picture in pictures:
        file = Path(__file__).parents[1] / picture
        with Image.open(file) as image:
            assert image.width >= 1200
        assert file.stat().st_size < 300_000
