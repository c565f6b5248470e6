from dataclasses import replace

import pytest
import torch

from iddpm.unet import UNet
from pipeline.hardware import memory_bytes, peak_flops
from pipeline.presets import PRESETS

SHARE = 8


def test_the_peak_is_a_rate_of_this_machine() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), "fp32") < 1e15


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("labels", [None, 10])
def test_activations_are_what_the_forward_pass_saves(precision: str, compiled: bool, labels: int | None) -> None:
    config = PRESETS["digits"]
    model = replace(config.model, num_classes=labels)
    config = replace(config, precision=precision, model=model, launch=replace(config.launch, compile=compiled))
    estimated = memory_bytes(config, SHARE)

    network = UNet(config.model, config.out_channels)
    network.to(torch.float64 if precision == "fp64" else torch.float32).fuse(compiled)
    count = sum(p.numel() for p in network.parameters())
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(SHARE, 1, config.model.image_size, config.model.image_size)
    y = torch.zeros(SHARE, dtype=torch.int64) if labels else None
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, precision == "bf16"), torch.compiler.set_stance("force_eager"):
        output = network(x, torch.rand(SHARE) * 1000, y)
    copies = 2 * count if precision == "bf16" else 0
    assert output.shape == (SHARE, 2, config.model.image_size, config.model.image_size)
    assert sum(saved.values()) - copies == pytest.approx(estimated["activations"], rel=0.15)
    assert estimated["weights"] == count * (8 if precision == "fp64" else 4) + copies


def test_checkpointing_saves_most_activations_and_nothing_else() -> None:
    config = PRESETS["imagenet64"]
    plain = memory_bytes(config, SHARE)
    cheap = memory_bytes(replace(config, checkpoint_activations=True), SHARE)
    assert cheap.pop("activations") < plain.pop("activations") / 3
    assert cheap == plain
