"""A sweep's configuration: every fault is named with its file, its field and what would be right."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import yaml
from pydantic import BaseModel

from quee_core.config import SweepConfig, load_config, parse_config
from quee_core.errors import ConfigError
from quee_core.finetune_config import load_finetune_config

FOLDER = Path(__file__).parents[1] / "configs"
FINETUNINGS = sorted((FOLDER / "finetune").glob("*.yaml"))
CONFIGS = sorted(set(FOLDER.glob("**/*.yaml")) - set(FINETUNINGS))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    assert load_config(path).name


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"datset": {}}, r"datset: unknown field; did you mean 'dataset'"),
        ({"dataset": {"nmae": "x"}}, r"dataset.nmae: unknown field; did you mean 'name'"),
        ({"predictors": [{"name": "mlp", "feature": "both"}]}, r"predictors.0.feature: .*did you mean 'features'"),
        ({"paths": {"bits": [0, 4]}}, r"paths.bits: \[0\] are not among"),
        ({"paths": {"bits": [1]}}, r"paths.bits: \[1\]"),
        ({"paths": {"bits": [33]}}, r"paths.bits: \[33\]"),
        ({"paths": {"bits": ["four"]}}, r"paths.bits.0: .*'four'"),
        ({"paths": {"bits": []}}, r"paths.bits: empty"),
        ({"prices": {"values": []}}, r"prices: values: empty"),
        ({"prices": {"values": [float("nan")]}}, r"prices.values.0: .*finite"),
        ({"prices": {"values": [0.1, -1]}}, r"prices.values.1: .*greater than or equal to 0"),
        ({"prices": {"lowest": 2, "highest": 1}}, r"prices: lowest 2 is above highest 1"),
        ({"dataset": {"fit": 0.9}}, r"dataset: fit \+ target"),
        ({"targets": {"clusters": [0]}}, r"targets.clusters: \[0\]"),
        ({"predictors": []}, r"predictors: 0 given; want at least 1"),
        ({"evaluation": {"budgets": []}}, r"evaluation.budgets: 0 given; want at least 1"),
        ({"targets": {"shrinkage": []}}, r"targets.shrinkage: 0 given; want at least 1"),
        ({"name": "../up"}, r"name: "),
        ({"backbone": {"exits": [0]}}, r"backbone.exits.0"),
    ],
)
def test_faults_are_named(raw: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(raw, source="sweep.yaml")


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"paths": {"bits": [1]}, "seed": -1}, source="sweep.yaml")
    assert "paths.bits" in str(caught.value)
    assert "seed" in str(caught.value)


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b", "\t\tx: 1", "", "# all of it was commented out\n"])
def test_what_is_no_mapping_is_refused_with_the_file_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"sweep\.yaml"):
        load_config(path)


@pytest.mark.parametrize("path", FINETUNINGS, ids=lambda p: p.stem)
def test_a_fine_tuning_is_no_sweep(path: Path) -> None:
    with pytest.raises(ConfigError, match=f"it is a fine-tuning; run `quee finetune {re.escape(str(path))}`"):
        load_config(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_sweep_is_no_fine_tuning(path: Path) -> None:
    with pytest.raises(ConfigError, match=f"it is a sweep; run `quee sweep {re.escape(str(path))}`"):
        load_finetune_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml.*cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_a_configuration_survives_its_text_form() -> None:
    config = load_config(CONFIGS[0])
    assert SweepConfig.model_validate_json(config.model_dump_json()) == config
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))), source="x") == config


def test_the_price_grid_ascends_from_zero() -> None:
    prices = SweepConfig().prices.grid()
    assert prices[0] == 0
    assert (np.diff(prices) > 0).all()


def settings_of(section: type[BaseModel], place: str = "") -> Iterator[tuple[str, str | None]]:
    """Every section and setting below `section` with its description: of a section the docstring, else the field's."""
    for name, field in section.model_fields.items():
        inner = [c for c in (field.annotation, *get_args(field.annotation)) if isinstance(c, type)]
        models = [c for c in inner if issubclass(c, BaseModel)]
        for model in models:
            yield f"{place}{name}", model.__doc__
            yield from settings_of(model, f"{place}{name}.")
        if field.annotation not in models:
            yield f"{place}{name}", field.description


def test_every_setting_says_what_it_is() -> None:
    described = list(settings_of(SweepConfig))
    assert {"dataset.fit", "predictors", "predictors.features", "evaluation", "run.dask", "seed"} <= {
        place for place, _ in described
    }
    assert [place for place, text in described if not (text or "").strip()] == []


@pytest.mark.parametrize(
    ("section", "field", "address"),
    [
        ("run", "store", "s3://key:planted@bucket/prefix"),
        ("run", "mlflow_uri", "http://user:planted@mlflow.lab:5000"),
        ("run", "artifacts", "s3://bucket/folder?token=planted"),
        ("backbone", "checkpoint", "s3://key:planted@bucket/weights.safetensors"),
    ],
)
def test_an_address_with_credentials_is_refused_and_not_repeated(section: str, field: str, address: str) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.{field}: credentials do not belong in an address") as told:
        parse_config({section: {field: address}}, source="mine.yaml")
    assert "planted" not in str(told.value)


@pytest.mark.parametrize("path", FINETUNINGS, ids=lambda path: path.stem)
def test_shipped_finetunings_are_valid(path: Path) -> None:
    assert load_finetune_config(path).name == path.stem.replace("_", "-")
