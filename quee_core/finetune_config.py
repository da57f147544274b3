"""What one fine-tuning is: pydantic models of its YAML file, with bounds and a sentence for every setting."""

from pathlib import Path as FilePath
from typing import Annotated, Literal

from pydantic import Field, model_validator

from quee_core.config import Address, BackboneConfig, Section, SweepConfig, checked, read_yaml
from quee_core.errors import ConfigError


class FinetuneDataConfig(Section):
    """Images, and which of them the backbone learns from."""

    name: str = Field("fashion_mnist", description="A name that `quee datasets` lists.")
    root: FilePath | None = Field(None, description="Folder of the files, for sets that quee does not ship.")
    share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.8,
        description="Share of all images but the test part that is learnt from, where the set has no other labelled "
        "part beside `train`, which is learnt as a whole; a sweep tunes and chooses on images that were not.",
    )
    seed: int = Field(0, ge=0, description="Seed of the hash that draws them.")
    limit: int | None = Field(None, ge=8, description="Learn from at most this many images.")
    watched: int = Field(2000, ge=8, description="Held-out images, at most, that each epoch is looked at on.")


class TrainingConfig(Section):
    """AdamW with a warm-up and a cosine to 0."""

    epochs: int = Field(30, ge=1, description="Passes over the images.")
    batch: int = Field(128, ge=1, description="Images a step.")
    learning_rate: float = Field(2e-4, gt=0, description="Peak of the schedule.")
    weight_decay: float = Field(0.05, ge=0, description="Of matrices; biases, norms and embeddings have none.")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="Share of the steps before the peak.")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="Share of the label given to all.")
    clip: float = Field(1.0, gt=0, description="Largest norm of a gradient.")
    least_crop: Annotated[float, Field(gt=0, le=1)] = Field(
        0.35, description="Least share of an image's area that a random crop keeps; 1 crops nothing."
    )
    mirror: bool = Field(True, description="Whether half of the images are mirrored; not for text, for instance.")
    erase: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="Chance that a random rectangle is erased.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of products; auto: bfloat16 or float16 on a GPU, as it can, float32 on a CPU."
    )
    compile: bool | None = Field(None, description="Whether torch compiles the model; by default on a GPU.")
    workers: int = Field(0, ge=0, description="Processes that decode images; 0: the training process itself.")
    seed: int = Field(0, ge=0, description="Seed of the new head, the order of images, and their crops.")


class FinetuneRunConfig(Section):
    """Where the work is done and what is kept; changes no result."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    runs: FilePath = Field(FilePath("runs"), description="Folder of the run's own folder.")
    mlflow_uri: Address | None = Field(None, description="MLflow tracking URI; by default SQLite in the runs folder.")
    artifacts: Address | None = Field(None, description="As in a sweep: where figures and models go.")


class FinetuneConfig(Section):
    """One fine-tuning: a backbone's weights, a data set, a training schedule."""

    name: str = Field("finetuned", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$", description="Names the run's folder.")
    dataset: FinetuneDataConfig = FinetuneDataConfig()
    backbone: BackboneConfig = Field(
        BackboneConfig(), description="What it starts from; its head is replaced by a new one for the set's classes."
    )
    training: TrainingConfig = TrainingConfig()
    run: FinetuneRunConfig = FinetuneRunConfig()

    @model_validator(mode="after")
    def _a_new_head(self) -> "FinetuneConfig":
        if self.backbone.head is not None or self.backbone.num_classes is not None:
            raise ValueError("backbone: a new head is trained, for the set's classes; leave head and num_classes out")
        return self


def load_finetune_config(path: FilePath) -> FinetuneConfig:
    """Read a fine-tuning from YAML. Raises ConfigError that names file and field."""
    raw = read_yaml(path, example="configs/finetune/cifar10_t2t7.yaml")
    of_sweeps = sorted(raw.keys() & (SweepConfig.model_fields.keys() - FinetuneConfig.model_fields.keys()))
    if of_sweeps and "training" not in raw:
        raise ConfigError(
            f"{path}: has {', '.join(of_sweeps)} and no training, so it is a sweep; run `quee sweep {path}`"
        )
    return checked(FinetuneConfig, raw, source=str(path))
