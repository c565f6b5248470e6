"""Loading of the published improved-diffusion checkpoints (.pt files), whose names match `UNet`'s state_dict."""

from pathlib import Path

import torch
from torch import Tensor

from iddpm.config import UNetConfig
from iddpm.unet import UNet


def load_published(path: str | Path, config: UNetConfig, out_channels: int) -> dict[str, Tensor]:
    """Load a file's weights on the CPU, for `UNet(config, out_channels).load_state_dict`.

    Raises ValueError if the file does not hold only tensors (nothing in it is ever executed), or if names or shapes
    do not match the model's; the message lists which.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a corrupt file can make the unpickler raise nearly anything
        raise ValueError(f"{path}: not a checkpoint of tensors only: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a dict of tensors, a UNet's state_dict")

    with torch.device("meta"):
        model = UNet(config, out_channels)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: not the weights of this model config: {error}") from error
    return state
