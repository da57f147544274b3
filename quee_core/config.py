"""What one sweep is: pydantic models of a sweep's YAML file, with bounds and a sentence for every setting."""

import math
import re
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quee_core.data.datasets import TrainedOn
from quee_core.data.splits import TrainedShare
from quee_core.errors import ConfigError, did_you_mean
from quee_core.paths import PathTree, PolicyName, check_bit_widths
from quee_core.redaction import WITHOUT_LOGIN, without_secrets

Fraction = Annotated[float, Field(ge=0, le=1)]

BaselineName = Literal[
    "static", "threshold", "random", "jei-dnn", "boosted", "l2w-style", "maqee-style", "eenet-style", "eefp", "oracle"
]

SECRET_FAULT = "credentials"  # begins the fault whose input is not shown
# settings of earlier versions, and what there is instead
FORMER = {"run.shards": "say run.shard_images instead, how many images a shard has"}
_DASK_ADDRESS = re.compile(r"(tcp|tls)://([^\s/:\[\]]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}")


class Section(BaseModel):
    """Base of all sections: immutable, refusing unknown fields, showing docstrings as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


def _known_widths(bits: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return check_bit_widths(bits)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("bits: ")) from None


def _no_credentials(address: str) -> str:
    """`address`, unless it carries a password: Prefect, MLflow and the report show and keep what a sweep says."""
    if without_secrets(address) != address:
        raise ValueError(
            f"{SECRET_FAULT} do not belong in an address, which is shown and recorded; give them by the usual "
            "variables: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        )
    return address


Address = Annotated[str, AfterValidator(_no_credentials), Field(json_schema_extra={"pattern": WITHOUT_LOGIN})]

IMAGE_PLACES = ("s3", "s3a", "file", "memory")  # whose faults are put into words

S = TypeVar("S", bound=Section)


class DatasetConfig(Section):
    """Images, and how they are divided."""

    name: str = Field("fashion_mnist", description="A name that `quee datasets` lists.")
    root: FilePath | None = Field(None, description="Folder of the files, for sets that quee does not ship.")
    url: Address | None = Field(
        None,
        description="Where the files of a `parquet` set lie instead, such as s3://bucket/prefix. Each walk reads the "
        "row groups that it needs anew, and so does each image's fingerprint: copy what is read often to a disk. "
        "`root` still serves weights.",
    )
    fit: Fraction = Field(
        0.40,
        description="Share of the non-test images for calibration, heads and PCA; where the backbone was trained on a "
        "part of the set, that part is `fit`, and `target` and `select` share the others.",
    )
    target: Fraction = Field(0.45, description="Share of the non-test images for targets, predictors and thresholds.")
    select: Fraction = Field(0.15, description="Share of the non-test images for choosing predictors and thresholds.")
    test: Fraction = Field(0.0, description="Share for test, where the set has no official test part.")
    seed: int = Field(0, ge=0, description="Seed of the hash that assigns images to splits.")
    trained_on: Literal["none", "train", "unknown", "share"] | None = Field(
        None,
        description="Part that the backbone was trained on; by default what weights of `quee finetune` say, or else "
        "the data set's description. `share`: that share of all images but the test part which `quee finetune` took.",
    )
    trained_share: Fraction | None = Field(None, description="How much `share` is.")
    trained_seed: int = Field(0, ge=0, description="Seed of the hash that `share` was drawn by.")
    limit: int | None = Field(None, ge=50, description="At most this many images in each split.")
    unlabelled: int = Field(
        0,
        ge=0,
        description="At most this many images of the part `unlabelled`, where the set has one: rules are chosen on "
        "them too, by what all paths together make of each. It helps some models and hurts others (docs/method.md).",
    )

    @model_validator(mode="after")
    def _shares_add_up(self) -> "DatasetConfig":
        total = self.fit + self.target + self.select + self.test
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(f"fit + target + select + test = {total:g}; want 1")
        if min(self.fit, self.target, self.select) <= 0:
            raise ValueError("fit, target and select must each be above 0")
        return self

    @model_validator(mode="after")
    def _share_is_given(self) -> "DatasetConfig":
        if (self.trained_on == "share") != (self.trained_share is not None):
            raise ValueError("trained_on: share and trained_share belong together; give both, or neither")
        return self

    @field_validator("url")
    @classmethod
    def _readable(cls, url: str | None) -> str | None:
        """Forms send an empty text for none."""
        if url and url.partition("://")[0] not in IMAGE_PLACES:
            raise ValueError(f"{url}: want s3://bucket/prefix; a folder is given as root")
        return url or None

    @property
    def seen_by_backbone(self) -> TrainedOn | TrainedShare | None:
        """What `choose_splits` is told of the backbone's own training images."""
        if self.trained_on != "share":
            return self.trained_on
        assert self.trained_share is not None  # see the validator
        return TrainedShare(self.trained_share, self.trained_seed)

    @property
    def fractions(self) -> dict[Literal["fit", "target", "select", "test"], float]:
        """Share of each split, by name."""
        return {"fit": self.fit, "target": self.target, "select": self.select, "test": self.test}


class BackboneConfig(Section):
    """A frozen pretrained classifier, and where it is cut."""

    name: str = Field("micro_vit_fashion_mnist", description="A name that `quee backbones list` shows.")
    checkpoint: Address | None = Field(
        None,
        description="Weights: safetensors, or a pickle of plain tensors; a path, or an s3:// address. A relative path "
        "counts from the working folder, and if it is not there from dataset.root.",
    )
    pretrained: bool = Field(False, description="Download timm's own weights (needs a network).")
    random_weights: bool = Field(
        False,
        description="Weights as they are before training, instead of a checkpoint: to try a pipeline before they are "
        "there. The figures then say nothing about the backbone, and the router is not registered.",
    )
    num_classes: int | None = Field(None, ge=2, description="Classes of the checkpoint's head, if not the model's own.")
    head: Address | None = Field(
        None,
        description="A linear head in a file of its own, for a backbone that has none, such as DINOv2's: weight "
        "[classes, d] or, on class token and mean patch token, [classes, 2 d]. A path counts as the checkpoint's does.",
    )
    image_size: int | None = Field(None, ge=8, description="Side of the input in pixels, if not the model's own.")
    exits: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="Blocks that have run at each exit, ascending; by default four, evenly spaced."
    )

    @model_validator(mode="after")
    def _one_source(self) -> "BackboneConfig":
        if self.random_weights and (self.pretrained or self.checkpoint is not None):
            other = "pretrained" if self.pretrained else "checkpoint"
            raise ValueError(f"random_weights and {other}: give one of the two")
        return self


class PathsConfig(Section):
    """Bit-widths, and which paths of the tree are kept."""

    bits: tuple[int, ...] = Field((3, 4, 6), description="Bit-widths of weights and activations: 2 to 8, and 32.")
    policy: PolicyName = Field("monotone", description="uniform, monotone (never rising), full or sampled.")
    sampled_paths: int = Field(32, ge=1, description="Full-depth paths that the policy 'sampled' draws.")
    seed: int = Field(0, ge=0, description="Seed of the policy 'sampled'.")

    @field_validator("bits")
    @classmethod
    def _known_widths(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        return _known_widths(bits)

    def tree(self, depth: int) -> PathTree:
        """The kept paths for a backbone of `depth` exits."""
        return PathTree.of(self.bits, depth, self.policy, sampled_paths=self.sampled_paths, seed=self.seed)


class QuantizationConfig(Section):
    """Post-training quantisation (design, section 3)."""

    method: str = Field("compensated", description="compensated, mse, repq, erq or minmax.")
    images: int = Field(256, ge=8, description="Calibration images, out of `fit`.")
    edge_bits: int | None = Field(
        None, description="Bit-width of stem and heads; by default 8, or 32 where all of paths.bits are above 8."
    )
    stem_bits: int | None = Field(
        None, description="Bit-width of the stem's layers behind its first, which sees the image; by default edge_bits."
    )

    @field_validator("edge_bits", "stem_bits")
    @classmethod
    def _known_width(cls, bits: int | None) -> int | None:
        return None if bits is None else _known_widths((bits,))[0]


class HeadsConfig(Section):
    """Training of the exit heads (design, section 4)."""

    bits: tuple[int, ...] | None = Field(
        None,
        description="Precisions the heads are trained on, besides 32; by default paths.bits. "
        "Fix it, and a sweep with one more bit-width reuses all tables of the others.",
    )
    images: int = Field(
        20_000,
        ge=50,
        description="At most this many images of `fit`. Meanwhile their features lie in the folder for temporary "
        "files: exits x views x images x 13 d x 4 bytes, with 1 + bit-widths + 2 x copies views.",
    )
    statistics: int = Field(
        13,
        ge=1,
        le=13,
        description="How many statistics of the tokens a head sees; 2: the class token, the mean patch.",
    )
    hidden: int = Field(64, ge=0, le=4096, description="Width of a hidden layer beside the linear one; 0: none.")
    distillation: Fraction = Field(
        0.8, description="Weight of the backbone's own answer at full precision in what heads learn, beside the label."
    )
    copies: int = Field(4, ge=0, le=64, description="Shifted copies of each image, each along a mixed path.")
    mirror: bool = Field(True, description="Whether half of the copies are mirrored; not for text, for instance.")
    epochs: int = Field(150, ge=1, description="Passes over the images; each pass sees an image in one of its views.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak of the cosine schedule.")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's; pulls the heads' weights towards 0.")
    dropout: float = Field(0.2, ge=0, lt=1, description="Share of hidden features left out at a time in training.")
    batch: int = Field(512, ge=8, description="Rows a step.")
    seed: int = Field(0, ge=0, description="Seed of first weights, of the order of rows, and of the PCA.")

    @field_validator("bits")
    @classmethod
    def _known_widths(cls, bits: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if bits is None else _known_widths(bits)


class EmbeddingConfig(Section):
    """The compact image features of a gate: PCA of the pooled tokens."""

    dimensions: int = Field(32, ge=1, le=1024, description="PCA components kept.")


class TargetsConfig(Section):
    """Targets by discretising the feature space (design, section 7): every combination is a member of the grid."""

    clusters: tuple[int | None, ...] = Field((None, 20, 100), description="K; null is infinite: labels as targets.")
    shrinkage: tuple[Annotated[float, Field(gt=0)], ...] = Field((5.0,), min_length=1, description="n_0, in images.")
    clustering_features: Literal["uncertainty", "embedding", "both"] = Field(
        "both", description="What is clustered: uncertainty (of the exit's answer), embedding (PCA), or both."
    )
    algorithm: Literal["kmeans", "minibatch"] = Field("kmeans", description="kmeans, or minibatch for many images.")

    @field_validator("clusters")
    @classmethod
    def _at_least_one(cls, clusters: tuple[int | None, ...]) -> tuple[int | None, ...]:
        if not clusters:
            raise ValueError("empty; want at least one number of clusters, or null")
        if bad := [k for k in clusters if k is not None and k < 1]:
            raise ValueError(f"{bad}: a number of clusters is 1 or more, or null")
        return clusters


class PredictorConfig(Section):
    """One predictor of the grid, with its hyper-parameters."""

    name: str = Field(description="mlp, logistic, boosted_trees or nearest_cluster.")
    features: Literal["uncertainty", "embedding", "both"] = Field(
        "both", description="What it predicts from: uncertainty (of the exit's answer), embedding (PCA), or both."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Hyper-parameters of the predictor.")


class PricesConfig(Section):
    """The λ grid: errors that one full path of compute is worth."""

    lowest: float = Field(1e-3, gt=0, description="Least price of the grid above 0.")
    highest: float = Field(30.0, gt=0, description="High enough for the cheapest path to win.")
    count: int = Field(120, ge=1, le=10_000, description="Prices of the grid, evenly spaced on a logarithmic scale.")
    values: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(None, description="An explicit grid instead.")

    @model_validator(mode="after")
    def _ordered(self) -> "PricesConfig":
        if self.values is not None and not self.values:
            raise ValueError("values: empty; want at least one price λ")
        if self.values is None and self.lowest > self.highest:
            raise ValueError(f"lowest {self.lowest:g} is above highest {self.highest:g}")
        return self

    def grid(self) -> NDArray[np.float64]:
        """Prices λ, ascending, float64 [count]; 0 (accuracy alone) comes first where the grid is not explicit."""
        if self.values is not None:
            return np.unique(np.asarray(self.values, np.float64))
        return np.concatenate([[0.0], np.geomspace(self.lowest, self.highest, self.count)])


class CostConfig(Section):
    """What a path costs."""

    unit: Literal["bitops", "milliseconds"] = Field("bitops", description="Simulated BitOps, or time on this device.")
    batch: int = Field(256, ge=1, description="Images a batch when time is measured.")
    repeats: int = Field(5, ge=1, description="Timed runs, of which the median counts.")


class EvaluationConfig(Section):
    """How fronts are reported."""

    budgets: Annotated[tuple[Fraction, ...], Field(min_length=1)] | None = Field(
        None,
        description="Relative costs; by default seven between the cheapest path's and 1, denser where it is cheap.",
    )
    baselines: Annotated[tuple[BaselineName, ...], Field(min_length=1)] = Field(
        get_args(BaselineName),
        description="What quee is compared with (docs/method.md); all, by default. oracle is a bound, no rival.",
    )
    resamples: int = Field(2000, ge=100, description="Bootstrap resamples.")
    seed: int = Field(0, ge=0, description="Seed of the bootstrap and of the random exits.")


class DaskTLSConfig(Section):
    """Files, in PEM form, by which quee and a Dask scheduler at tls:// know each other."""

    ca: FilePath = Field(description="Certificate of the authority that signed the scheduler's and the workers'.")
    cert: FilePath = Field(description="quee's own certificate.")
    key: FilePath = Field(description="The private key of that certificate.")


class RunConfig(Section):
    """Where and how the work is done; changes no result."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    batch: int = Field(256, ge=1, description="Images a batch in the walk.")
    shard_images: int = Field(5000, ge=1, description="Images of one shard: the work that a crash can lose.")
    store: Address = Field(
        "store",
        description="Folder of the store of tables, or its URL, such as s3://bucket/prefix; credentials for it come "
        "from AWS's usual variables or a profile.",
    )
    runs: FilePath = Field(FilePath("runs"), description="Folder of records and reports.")
    mlflow_uri: Address | None = Field(None, description="MLflow tracking URI; by default SQLite in the runs folder.")
    artifacts: Address | None = Field(
        None,
        description="Folder or URL (s3://bucket/folder) for figures and models of MLflow experiments that are new; by "
        "default a folder beside MLflow's SQLite file, and what the server says where mlflow_uri names one.",
    )
    pictures: bool = Field(
        True,
        description="Draw the front as a picture too, for MLflow and Prefect: 3 seconds of Chromium or Chrome; where "
        "there is neither, the front is a page alone.",
    )
    dask_workers: int = Field(2, ge=1, le=256, description="Threads of the in-process Dask cluster.")
    dask: str | None = Field(
        None,
        description="Address of a Dask scheduler to use instead, tcp://HOST:PORT or tls://HOST:PORT. Its workers need "
        "this version of quee, and reach the store by the same URL.",
    )
    dask_tls: DaskTLSConfig | None = Field(None, description="Files for a scheduler at tls://: ca, cert and key.")
    dask_timeout: float = Field(
        60.0, gt=0, description="Seconds in which that scheduler must answer, and have a worker again if none is left."
    )

    @field_validator("dask")
    @classmethod
    def _an_address(cls, address: str | None) -> str | None:
        if address is not None and not _DASK_ADDRESS.fullmatch(address):
            raise ValueError("want tcp://HOST:PORT or tls://HOST:PORT, as the scheduler prints it when it starts")
        return address

    @model_validator(mode="after")
    def _tls_as_addressed(self) -> "RunConfig":
        if self.dask is not None and self.dask.startswith("tls://") and self.dask_tls is None:
            raise ValueError(f"dask: {self.dask} needs certificates; set run.dask_tls to {{ca: …, cert: …, key: …}}")
        if self.dask is not None and self.dask.startswith("tcp://") and self.dask_tls is not None:
            raise ValueError(f"dask: {self.dask} is not encrypted, but run.dask_tls is set; say tls:// or leave it out")
        return self


DEFAULT_PREDICTORS = (
    PredictorConfig(name="mlp"),
    PredictorConfig(name="mlp", features="uncertainty"),
    PredictorConfig(name="logistic"),
    PredictorConfig(name="nearest_cluster"),
)


class SweepConfig(Section):
    """One sweep: a data set, a backbone, a path tree, a grid of predictors, and the price grid."""

    name: str = Field("sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$", description="Names the run's folder.")
    dataset: DatasetConfig = DatasetConfig()
    backbone: BackboneConfig = BackboneConfig()
    paths: PathsConfig = PathsConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    heads: HeadsConfig = HeadsConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    targets: TargetsConfig = TargetsConfig()
    predictors: tuple[PredictorConfig, ...] = Field(
        DEFAULT_PREDICTORS, min_length=1, description="What is fitted to the targets; each is a member of the grid."
    )
    prices: PricesConfig = PricesConfig()
    cost: CostConfig = CostConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()
    seed: int = Field(0, ge=0, description="Seed of clusterings and predictors.")


def load_config(path: FilePath) -> SweepConfig:
    """Read a sweep from YAML.

    Raises ConfigError that names file and field, with the nearest known name for a misspelt one.
    """
    raw = read_yaml(path, example="configs/quick.yaml")
    if "training" in raw:
        raise ConfigError(f"{path}: has a section training, so it is a fine-tuning; run `quee finetune {path}`")
    return parse_config(raw, source=str(path))


def read_yaml(path: FilePath, *, example: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError for anything else, which names the file and an `example`."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({reason}); want a YAML file such as {example}") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        raise ConfigError(f"{path}: says nothing; want settings such as those of {example}, or {{}} for the defaults")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: want a mapping of sections at the top, found a {type(raw).__name__}")
    return raw


def parse_config(raw: dict[str, Any], *, source: str) -> SweepConfig:
    """Check a sweep given as a mapping. Raises ConfigError naming `source` and every faulty field."""
    return checked(SweepConfig, raw, source=source)


def checked(model: type[S], raw: dict[str, Any], *, source: str) -> S:
    """Check what a file says against `model`. Raises ConfigError naming `source` and every faulty field."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        faults = [_fault(dict(e), model) for e in error.errors(include_url=False)]
        raise ConfigError(f"{source}: " + "; ".join(faults)) from None


def _fault(error: dict[str, Any], model: type[Section]) -> str:
    place = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "extra_forbidden" and place in FORMER:
        return f"{place}: a setting of an earlier version of quee; {FORMER[place]}"
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown field; {did_you_mean(str(error['loc'][-1]), _fields_at(model, error['loc'][:-1]))}"
    if error["type"] == "too_short":
        return f"{place}: {error['ctx']['actual_length']} given; want at least {error['ctx']['min_length']}"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    hidden = isinstance(given, dict | list) or error["type"] == "missing" or message.startswith(SECRET_FAULT)
    shown = "" if hidden else f" (given: {given!r})"
    return f"{place}: {message}{shown}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
