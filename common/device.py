"""Which device PyTorch computes on."""

import torch

from common.errors import UserError


def choose_device(name: str | None) -> torch.device:
    """The device `name`; if it is not given: CUDA, MPS or XPU if there is one, else the CPU.

    UserError where PyTorch does not know the name, or sees no such device here.
    """
    available = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return available or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device: pass cpu, cuda or cuda:0") from error
    is_there = device.type == "cpu" or (available is not None and device.type == available.type)
    if not is_there:
        seen = "no GPU" if available is None else f"only {available.type}"
        raise UserError(
            f"--device {name} but PyTorch sees {seen} here: pass --device cpu, or install a build "
            "of PyTorch for it"
        )
    n_devices = 1 if available is None else torch.accelerator.device_count()
    if (device.index or 0) >= n_devices:
        raise UserError(
            f"--device {name} but there are only {n_devices} here: pass {device.type}:0"
        )
    return device
