"""Fine-tuning of a backbone on a share of a data set's images, an epoch at a time, to be continued after a crash.

What an image looks like in an epoch depends on the seed, the epoch and its place alone, and the learning rate on the
step: a training that was interrupted ends with the bits of one that was not, on a CPU of the same kind.
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from quee_core.backbones.checkpoints import TRAINING_STATE
from quee_core.backbones.registry import load_model
from quee_core.config import SweepConfig
from quee_core.data.datasets import ImageDataset, load_dataset
from quee_core.data.loading import image_batches
from quee_core.data.preprocessing import Preprocessing, converted
from quee_core.data.splits import Selection, TrainedShare, image_count, subsample, trained_parts
from quee_core.devices import choose_device
from quee_core.errors import ConfigError, DamagedTableError, DataError, NumericError, QueeError
from quee_core.finetune_config import FinetuneConfig, TrainingConfig
from quee_core.fingerprints import fingerprint
from quee_core.fronts import wilson_interval
from quee_core.plan import weights_file
from quee_core.trained_images import NOTE, Presence, TrainedImages, probes_of, read_trained_images
from quee_core.whole_files import disk_faults, whole_file

STATE = "training.pt"
WEIGHTS = "weights.safetensors"
EVALUATION_BATCH = 256
AMPERE = 8  # major compute capability of the first GPUs that multiply bfloat16
NO_MATTER = (("dataset", "root"), ("backbone", "checkpoint"), ("backbone", "exits"), ("training", "workers"))


@dataclass(frozen=True)
class Epoch:
    """One pass. number: from 1. loss: mean over its images. correct: of `n` held-out images, behind it.

    learning_rate: of its last step. images_per_second: of training alone.
    """

    number: int
    loss: float
    correct: int
    n: int
    learning_rate: float
    seconds: float
    images_per_second: float

    @property
    def accuracy(self) -> float:
        """On the held-out images."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return wilson_interval(self.correct, self.n)


@dataclass(frozen=True, eq=False)
class Training:
    """All that a training needs; made by `prepare`. model: timm's, with a new head. learnt, watched: images.

    seen: what the weights will say of `learnt`.
    """

    config: FinetuneConfig
    dataset: ImageDataset
    model: Any
    preprocessing: Preprocessing
    learnt: tuple[Selection, ...]
    watched: tuple[Selection, ...]
    seen: TrainedImages
    device: torch.device
    fingerprint: str

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(image_count(self.learnt) / self.config.training.batch)


def prepare(config: FinetuneConfig) -> Training:
    """Load images and starting weights, and draw what is learnt from.

    Raises the QueeError that names what does not fit, before anything is trained.
    """
    device = choose_device(config.run.device)
    checkpoint = weights_file(config.backbone.checkpoint, config.dataset.root, config.run.runs)
    dataset = load_dataset(config.dataset.name, config.dataset.root)
    about, asked = dataset.description, config.backbone
    parts, others = trained_parts(about)
    taken = TrainedShare(1.0 if others else config.dataset.share, config.dataset.seed)
    learnt, left = [], [Selection(part, np.arange(len(dataset.sample_ids(part)))) for part in others]
    for part in parts:
        saw = taken.saw(dataset.sample_ids(part))
        learnt.append(Selection(part, np.flatnonzero(saw)))
        left.append(Selection(part, np.flatnonzero(~saw)))
    if not image_count(learnt) or not image_count(left):
        raise DataError(
            f"data set {about.name}: {image_count(learnt)} images to learn from, {image_count(left)} left for a sweep; "
            "change dataset.share"
        )
    if config.dataset.limit is not None:
        learnt = [*subsample(dataset, learnt, config.dataset.limit, config.dataset.seed + 1)]
    watched = subsample(dataset, left, config.dataset.watched, config.dataset.seed + 1)
    seen = TrainedImages(
        name=config.dataset.name, trained_on="train" if others else "share", probes=probes_of(dataset, tuple(learnt)),
        **({} if others else {"trained_share": config.dataset.share, "trained_seed": config.dataset.seed}),
    )  # fmt: skip
    check_start(checkpoint, seen, dataset)
    model, data_config, start = load_model(
        asked.name, exits=asked.exits, checkpoint=checkpoint, pretrained=asked.pretrained, image_size=asked.image_size,
        random_weights=asked.random_weights, new_classes=len(about.classes), seed=config.training.seed,
    )  # fmt: skip
    contents = [(s.part, dataset.fingerprint(s.part, s.positions)) for s in learnt]
    settings = config.model_dump(mode="json", exclude={"run", "name"})
    for section, field in NO_MATTER:
        settings[section].pop(field)
    return Training(
        config, dataset, model, Preprocessing.from_data_config(data_config), tuple(learnt), watched,
        seen, device, fingerprint([settings, contents, start]),
    )  # fmt: skip


def check_start(checkpoint: FilePath | None, seen: TrainedImages, dataset: ImageDataset) -> None:
    """Raises ConfigError if starting weights have learnt from other images of `dataset`: a sweep can't know of both.

    seen: what the new weights will have learnt from. Images under the same names that were encoded anew pass for
    another set of that name. Raises CheckpointError, DataError as what it reads does.
    """
    before = read_trained_images(checkpoint)
    if before is None or before.name != seen.name:
        return
    here = before.look_in(dataset) is Presence.WHOLE
    if here and before.settings == seen.settings:
        return
    if not here and not before.reappear_in(dataset):  # another set of that name
        return
    told = ", ".join(f"{field} {value}" for field, value in before.settings.items())
    raise ConfigError(
        f"{checkpoint}: it has learnt from other images of {seen.name} before ({told}{'' if here else ', other names'})"
        ", which a sweep could not tell from new ones; take the same share, seed and names, or begin from other weights"
    )


def train(training: Training, folder: FilePath) -> Iterator[Epoch]:
    """Train in `folder`: the epochs that were done there before, then each further one once it is kept.

    At the end `folder` holds the weights (see `write_weights`). Raises ConfigError if another training was begun there,
    DamagedTableError for a state that cannot be read, NumericError for a loss that is no number, StoreError for a disk.
    """
    settings = training.config.training
    model = training.model.to(training.device)
    optimiser = _optimiser(model, settings)
    precision = _precision(settings, training.device)
    scaler = torch.amp.GradScaler(training.device.type, enabled=precision is torch.float16)
    done = _resume(folder / STATE, training, optimiser, scaler)
    yield from done
    compiled = settings.compile if settings.compile is not None else training.device.type == "cuda"
    run: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model
    for number in range(len(done) + 1, settings.epochs + 1):
        started = time.monotonic()
        loss, seen, rate = _pass(training, run, optimiser, scaler, precision, number)
        trained = time.monotonic() - started
        if not all(bool(tensor.isfinite().all()) for tensor in model.parameters()):
            raise NumericError(f"epoch {number}: weights are no numbers any more; lower training.learning_rate")
        correct, n = _evaluate(training, model)
        epoch = Epoch(number, loss, correct, n, rate, time.monotonic() - started, seen / trained)
        done.append(epoch)
        _keep(folder / STATE, training, optimiser, scaler, done)
        yield epoch
    write_weights(training, folder / WEIGHTS)


def sweep_of(training: Training, folder: FilePath) -> SweepConfig:
    """A sweep of the weights in `folder`, on the images that they have not seen; all else as by default."""
    config = training.config
    return SweepConfig.model_validate(
        {
            "name": f"{config.name}-sweep"[:80],
            "dataset": {
                "name": config.dataset.name, "root": config.dataset.root, **training.seen.settings,
            },
            "backbone": {
                "name": config.backbone.name, "exits": config.backbone.exits,
                "checkpoint": str((folder / WEIGHTS).resolve()), "image_size": config.backbone.image_size,
                "num_classes": len(training.dataset.description.classes),
            },
        }
    )  # fmt: skip


def write_weights(training: Training, path: FilePath) -> None:
    """The weights as safetensors, which say in their metadata which images they have seen. Raises StoreError."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in training.model.state_dict().items()}
    with disk_faults(path, "written"), whole_file(path) as file:
        file.write(save(tensors, {NOTE: training.seen.model_dump_json()}))


class _Images(Dataset[tuple[Tensor, int] | QueeError]):
    """The images of an epoch, cropped and mirrored as their places, the epoch and the seed say."""

    def __init__(self, training: Training, epoch: int) -> None:
        self._dataset = training.dataset
        self._places = [(s.part, int(position)) for s in training.learnt for position in s.positions]
        self._labels = np.concatenate([training.dataset.labels(s.part)[s.positions] for s in training.learnt])
        self._transform = _augmenting(training.preprocessing, training.config.training)
        self._mode = "L" if training.preprocessing.size[0] == 1 else "RGB"
        self._seed = (training.config.training.seed * 1_000_003 + epoch) % 2**31

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | QueeError:
        part, position = self._places[index]
        try:
            image = converted(self._dataset.image(part, position), self._mode)
        except QueeError as error:
            return error  # raised where it is told in a line: out of another process it comes as a traceback
        drawn = self._seed * 2_000_003 + index
        # timm's transforms draw from all three
        states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
        random.seed(drawn)
        np.random.seed(drawn % 2**32)
        torch.default_generator.manual_seed(drawn)
        try:
            return self._transform(image), int(self._labels[index])
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.default_generator.set_state(states[2])


def _together(items: list[tuple[Tensor, int] | QueeError]) -> tuple[Tensor, Tensor] | QueeError:
    """A batch, or the first fault among its images."""
    images, labels = [], []
    for item in items:
        if isinstance(item, QueeError):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels)


def _decoded(loader: Iterable[tuple[Tensor, Tensor] | QueeError]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches. Raises DataError for an image that cannot be read, or a process that was killed while it decoded."""
    batches = iter(loader)
    while True:
        try:
            batch = next(batches, None)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "a process that decodes images has ended unexpectedly; see that there is memory, or lower "
                "training.workers"
            ) from error
        if batch is None:
            return
        if isinstance(batch, QueeError):
            raise batch
        yield batch


def _augmenting(preprocessing: Preprocessing, settings: TrainingConfig) -> Callable[[Image.Image], Tensor]:
    transform: Callable[[Image.Image], Tensor] = create_transform(
        preprocessing.size, is_training=True, mean=preprocessing.mean, std=preprocessing.std,
        interpolation=preprocessing.interpolation, scale=(settings.least_crop, 1.0),
        ratio=(3 / 4, 4 / 3) if settings.least_crop < 1 else (1.0, 1.0),
        hflip=0.5 if settings.mirror else 0.0, color_jitter=0.0, re_prob=settings.erase,
    )  # fmt: skip
    return transform


def _optimiser(model: nn.Module, settings: TrainingConfig) -> torch.optim.AdamW:
    named = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
    plain = {name for name, tensor in named if tensor.ndim < 2 or name.endswith(("_embed", "_token"))}
    groups = [
        {"params": [tensor for name, tensor in named if name not in plain], "weight_decay": settings.weight_decay},
        {"params": [tensor for name, tensor in named if name in plain], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def _precision(settings: TrainingConfig, device: torch.device) -> torch.dtype:
    if settings.precision != "auto":
        named: torch.dtype = getattr(torch, settings.precision)
        return named
    if device.type != "cuda":
        return torch.float32
    # an older one would emulate bfloat16
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= AMPERE else torch.float16


def learning_rate(step: int, steps: int, settings: TrainingConfig) -> float:
    """Of step `step` (from 0) of `steps`: up in a line over the warm-up, then half a cosine down to 0."""
    warm = round(steps * settings.warmup)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    return settings.learning_rate * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1))) / 2


def _pass(
    training: Training,
    model: Callable[[Tensor], Tensor],
    optimiser: torch.optim.AdamW,
    scaler: torch.amp.GradScaler,
    precision: torch.dtype,
    number: int,
) -> tuple[float, int, float]:
    """Mean loss, number of images, and the last step's learning rate."""
    settings, device = training.config.training, training.device
    images = _Images(training, number)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + number))
    loader = DataLoader(
        images, settings.batch, sampler=order.tolist(), num_workers=settings.workers, pin_memory=device.type == "cuda",
        collate_fn=_together,
    )  # fmt: skip
    training.model.train()
    total, seen, rate = 0.0, 0, 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed * 1_000_003 + number)  # dropout and stochastic depth, where a model has them
        for step, (batch, labels) in enumerate(_decoded(loader), (number - 1) * training.steps):
            rate = learning_rate(step, settings.epochs * training.steps, settings)
            for group in optimiser.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
                logits = model(batch.to(device, non_blocking=True))
            wanted = labels.to(device, non_blocking=True)
            loss = functional.cross_entropy(logits.float(), wanted, label_smoothing=settings.label_smoothing)
            optimiser.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(training.model.parameters(), settings.clip)
            scaler.step(optimiser)
            scaler.update()
            total, seen = total + float(loss.detach()) * len(labels), seen + len(labels)
            if not math.isfinite(total):
                raise NumericError(
                    f"epoch {number}: the loss is no number any more; lower training.learning_rate (now "
                    f"{settings.learning_rate:g}), or set training.precision to float32, and give it another name"
                )
    return total / seen, seen, rate


@torch.inference_mode()
def _evaluate(training: Training, model: nn.Module) -> tuple[int, int]:
    """How many of the watched images are answered right, of how many."""
    model.eval()
    right = n = 0
    transform = training.preprocessing.transform()
    for batch in image_batches(training.dataset, training.watched, transform, EVALUATION_BATCH):
        answers = model(batch.images.to(training.device)).argmax(dim=1).cpu()
        right += int((answers == torch.from_numpy(batch.labels).long()).sum())
        n += len(answers)
    return right, n


def _keep(
    path: FilePath, training: Training, optimiser: torch.optim.AdamW, scaler: torch.amp.GradScaler, done: list[Epoch]
) -> None:
    state = {
        TRAINING_STATE: True, "fingerprint": training.fingerprint, "epochs": [asdict(epoch) for epoch in done],
        "model": training.model.state_dict(), "optimiser": optimiser.state_dict(), "scaler": scaler.state_dict(),
    }  # fmt: skip
    with disk_faults(path, "written"), whole_file(path) as file:
        torch.save(state, file)


def _resume(
    path: FilePath, training: Training, optimiser: torch.optim.AdamW, scaler: torch.amp.GradScaler
) -> list[Epoch]:
    """The epochs that are done, their state loaded; none if there is no state."""
    if not path.exists():
        return []
    try:
        state = torch.load(path, map_location=training.device, weights_only=True)
        found, done = state["fingerprint"], [Epoch(**epoch) for epoch in state["epochs"]]
    except Exception as error:  # damage makes the unpickler trip over its own stack, in any way that Python knows
        raise DamagedTableError(
            f"{path}: cannot be read ({(str(error) or type(error).__name__).splitlines()[0]}); delete it to begin anew"
        ) from error
    if found != training.fingerprint:
        raise ConfigError(
            f"{path.parent}: another training was begun here, of other settings, images or starting weights; "
            "give this one another name, or delete the folder"
        )
    training.model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    if state["scaler"]:  # of a training in float16; another device may go on in float16 with one that was not
        scaler.load_state_dict(state["scaler"])
    return done
