"""On a GPU, which these need: sums of integers are those of a CPU, an image's batch leaves no trace, sweeps run."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quee_core.backbones import load_backbone
from quee_core.data.loading import Batch
from quee_core.deployment import load_router
from quee_core.features import walk
from quee_core.finetuning import WEIGHTS, train
from quee_core.network import PathNetwork
from quee_core.quantize.calibration import calibrate, quantize_backbone
from quee_core.quantize.layers import QuantConv2d, QuantLinear, has_byte_products
from quee_core.quantize.methods import QUANT_METHODS
from quee_core.quantize.quantizers import Uniform
from quee_core.runs import router_folder
from quee_core.tables import Outcomes
from tests.conftest import SmallSweep
from tests.finished_run import FinishedRun, finished_run  # noqa: F401 (a fixture)
from tests.quee_command import finished, write_sweep
from tests.test_finetuning import training_of

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's, and those of torch's compiler
]

GPU = torch.device("cuda", 0)
ALIKE = 0.98  # share of images that both devices answer alike: where a sum of reals is rounded differs between them


@pytest.fixture(scope="module")
def network(small_sweep: SmallSweep) -> PathNetwork:
    """The small sweep's, on the GPU."""
    return copy.deepcopy(small_sweep.network).to(GPU)


def batches_of(small_sweep: SmallSweep, size: int) -> list[Batch]:
    """The images of `select`, `size` at a time."""
    whole = list(small_sweep.plan.batches(small_sweep.plan.splits["select"]))
    images, labels, ids = (torch.cat([b.images for b in whole]), *(
        np.concatenate([getattr(b, name) for b in whole]) for name in ("labels", "sample_ids")
    ))  # fmt: skip
    parts = [slice(start, start + size) for start in range(0, len(labels), size)]
    return [Batch(images[part], labels[part], ids[part]) for part in parts]


def outcomes(network: PathNetwork, small_sweep: SmallSweep, batches: list[Batch]) -> Outcomes:
    images = sum(len(batch.labels) for batch in batches)
    return Outcomes.from_tables(list(walk(network, batches, small_sweep.plan.tree.paths, images=images)))


@pytest.mark.parametrize("low", [-255, -128, -100, 0])
@pytest.mark.parametrize(("width", "out"), [(24, 40), (700, 40), (1504, 40), (1500, 40), (1504, 10)])
@pytest.mark.parametrize("rows", [1, 5, 6, 64])
def test_sums_of_a_linear_layer_are_those_of_a_cpu(low: int, width: int, out: int, rows: int) -> None:
    torch.manual_seed(width + rows)
    integers = torch.randint(-127, 128, (out, width), dtype=torch.int8)
    layer = QuantLinear(integers, torch.ones(out), torch.zeros(out), Uniform(1.0, low, low + 255))
    x = torch.randint(low, low + 256, (rows, 3, width)).float()
    wanted = (x.long() @ integers.long().T).float()
    assert torch.equal(layer.to(GPU)(x.to(GPU)).cpu(), wanted)


def test_tokens_of_one_image_may_lie_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, product, seen = has_byte_products(GPU), torch._int_mm, []
    monkeypatch.setattr(torch, "_int_mm", lambda rows, columns: seen.append(rows.device) or product(rows, columns))
    integers = torch.randint(-127, 128, (256, 576), dtype=torch.int8)
    layer = QuantLinear(integers, torch.ones(256), torch.zeros(256), Uniform(1.0, -100, 155))
    x = torch.randint(-100, 156, (1, 576, 196)).float().transpose(1, 2)
    assert torch.equal(layer.to(GPU)(x.to(GPU)).cpu(), (x.long() @ integers.long().T).float())
    assert seen == [GPU] * fast


@pytest.mark.parametrize("channels", [3, 64])
def test_sums_of_a_convolution_are_those_of_a_cpu(channels: int) -> None:
    conv = nn.Conv2d(channels, 8, 7, padding=3, stride=2, bias=False)
    integers = torch.randint(-127, 128, conv.weight.shape, dtype=torch.int8)
    layer = QuantConv2d(conv, integers, torch.ones(8), torch.zeros(8), Uniform(1.0, -100, 155))
    x = torch.randint(-100, 156, (5, channels, 15, 12)).float()
    wanted = layer(x)
    assert torch.equal(wanted, wanted.round())
    assert torch.equal(layer.to(GPU)(x.to(GPU)).cpu(), wanted)


def test_a_walk_answers_as_on_a_cpu(network: PathNetwork, small_sweep: SmallSweep) -> None:
    on_gpu = outcomes(network, small_sweep, batches_of(small_sweep, 64))
    assert (on_gpu.predicted == small_sweep.select.predicted).mean(axis=0).min() >= ALIKE
    np.testing.assert_allclose(on_gpu.top_p.mean(), small_sweep.select.top_p.mean(), atol=0.01)


def test_batches_leave_no_trace(network: PathNetwork, small_sweep: SmallSweep) -> None:
    together, apart = (outcomes(network, small_sweep, batches_of(small_sweep, size)) for size in (120, 7))
    for name in ("predicted", "uncertainty", "top_p", "embedding"):
        np.testing.assert_array_equal(getattr(together, name), getattr(apart, name), err_msg=name)


@pytest.mark.parametrize("method", sorted(QUANT_METHODS))
def test_every_method_calibrates_there(method: str, small_sweep: SmallSweep) -> None:
    plan = small_sweep.plan
    images = torch.cat([batch.images for batch in plan.batches(plan.splits["select"])])

    def answers(device: torch.device) -> Tensor:
        backbone = load_backbone("micro_vit_fashion_mnist", exits=(4, 8)).backbone.to(device)
        quantized = quantize_backbone(
            backbone, calibrate(backbone, images[:32].to(device), [4], method, edge_bits=8), [4]
        )
        tokens = quantized.to(device).stem(images.to(device))
        with torch.inference_mode():
            for index in range(2):
                tokens = quantized.segments(index, 4)(tokens)
            return backbone.output(tokens).argmax(dim=1).cpu()

    assert (answers(GPU) == answers(torch.device("cpu"))).float().mean() >= 0.9


def test_a_router_takes_the_paths_that_it_takes_on_a_cpu(
    finished_run: FinishedRun,  # noqa: F811
    small_sweep: SmallSweep,
) -> None:
    images = batches_of(small_sweep, 120)[0].images
    here, there = (load_router(router_folder(finished_run.folder), device) for device in ("cpu", GPU))
    for point in here.manifest.points:
        on_cpu, on_gpu = (loaded.router(images, point.as_rule()) for loaded in (here, there))
        assert (on_cpu.path == on_gpu.path).mean() >= ALIKE
        assert (on_cpu.probabilities.argmax(1) == on_gpu.probabilities.argmax(1)).mean() >= ALIKE


def test_a_sweep_takes_the_gpu_and_says_so(tmp_path: Path) -> None:
    write_sweep(tmp_path, run={"device": "auto"})
    record = finished(tmp_path)
    assert record.device == torch.cuda.get_device_name(GPU)
    again = finished(tmp_path)
    assert again.fronts == record.fronts


@pytest.mark.parametrize("precision", ["auto", "float16"])
def test_fine_tuning_compiles_and_mixes_precisions(tmp_path: Path, precision: str) -> None:
    training = training_of(tmp_path, run={"device": "auto"}, training={"precision": precision})
    folder = tmp_path / "here"
    folder.mkdir()
    epochs = list(train(training, folder))
    assert training.device == GPU
    assert epochs[-1].loss < epochs[0].loss
    assert epochs[-1].accuracy > 0.4
    weights = load_file(folder / WEIGHTS).values()
    assert {tensor.dtype for tensor in weights if tensor.is_floating_point()} == {torch.float32}
