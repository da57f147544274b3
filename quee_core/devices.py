"""Compute devices by name."""

import torch

from quee_core.errors import DeviceError


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" takes CUDA where there is one. Raises DeviceError for one that is not here."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device {name!r}: unknown; want auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu or auto"
        )
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {name!r}: not supported; want auto, cpu, cuda or cuda:N")
    return device


def choose_devices(name: str) -> tuple[torch.device, ...]:
    """The devices that branches are spread over: all of CUDA's for "auto" where there are any, or the one named.

    The first is what `choose_device` gives. Raises DeviceError for one that is not here.
    """
    first = choose_device(name)
    if name != "auto" or first.type != "cuda":
        return (first,)
    return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what it was given: a GPU's operations return before that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
