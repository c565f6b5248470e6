"""GPU tests: results match the CPU's, and no step waits for the device. Run separately with `pytest -m cuda`."""

from pathlib import Path

import pytest
import torch
from conftest import TINY, run_module, run_train

from iddpm.fused import fused_norm_act
from iddpm.noise import normal, stream_key, uniform
from iddpm.unet import norm_act
from pipeline.cli import parse_train
from pipeline.config import TrainConfig
from pipeline.data.stream import Batch
from pipeline.distributed.world import World
from pipeline.run.journal import read_journal
from pipeline.step import TrainState, train_step

pytestmark = pytest.mark.cuda

GPU = torch.device("cuda")
SAMPLED = ["--timestep-sampler", "loss-second-moment", "--diffusion.loss", "rescaled_kl", "--diffusion.timesteps", "4"]


def batch(config: TrainConfig, start: int) -> Batch:
    index = torch.arange(start, start + config.batch_size)
    images = torch.randint(0, 256, (config.batch_size, 1, 8, 8), dtype=torch.uint8)
    return Batch(images, torch.zeros(config.batch_size).long(), index, index)


def steps(device: torch.device, count: int, *flags: str) -> TrainState:
    """The training state after `count` steps on random images, which are the same on every device."""
    config, _ = parse_train([*TINY, *flags])
    torch.manual_seed(0)
    world = World(device=device)
    state = TrainState(config, world)
    for _ in range(count):
        train_step(state, batch(config, state.images), world)
        state.ema.update(state.params, state.step)
    return state


def test_noise_is_the_cpu_s() -> None:
    key, index = stream_key(0, "noise"), torch.arange(1000)
    assert torch.equal(uniform(key, index), uniform(key, index.to(GPU)).cpu())
    torch.testing.assert_close(normal(key, index, (3, 8, 8)), normal(key, index.to(GPU), (3, 8, 8)).cpu())


@pytest.mark.parametrize("flags", [[], SAMPLED, ["--microbatch", "5"]])
def test_steps_compute_what_they_do_on_the_cpu(flags: list[str]) -> None:
    here, there = (steps(device, 12, "--precision", "fp64", *flags).parts() for device in (torch.device("cpu"), GPU))
    for part, tensors in here.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(there[part][name].cpu(), tensor, rtol=1e-6, atol=1e-9, msg=f"{part} {name}")


@pytest.mark.parametrize("flags", [[], SAMPLED, ["--precision", "bf16", "--compile"], ["--checkpoint-activations"]])
def test_a_step_never_waits_for_the_device(flags: list[str]) -> None:
    state = steps(GPU, 2, *flags)  # one-time compilation and allocation may wait
    ready = batch(state.config, state.images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(state, ready, World(device=GPU))
        state.ema.update(state.params, state.step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_blocks_give_what_torch_s_do(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, scale, shift = (torch.randn(4, 96, *size, device=GPU, dtype=dtype) for size in ((16, 16), (1, 1), (1, 1)))
    x = x.to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 96, device=GPU)
    found = []
    for function in (fused_norm_act, norm_act):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias, scale, shift)]
        out = function(leaves[0], 32, *leaves[1:3], 1e-5, *leaves[3:])
        found.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for got, want in zip(*found, strict=True):
        error = (got - want).float().abs().max() / want.float().abs().max()
        assert error < (1e-4 if dtype == torch.float32 else 3e-2)


def test_a_run_trains_resumes_draws_and_is_measured(digits: str, tmp_path: Path) -> None:
    out, gpu = tmp_path / "run", ["--device", "cuda"]
    flags = [*TINY, *gpu, "--data.url", digits, "--out", str(out), "--precision", "bf16"]
    run_train(*flags, "--horizon", "6steps")
    assert "resuming at step 6" in run_train(*flags).stdout
    steps = [r["step"] for r in read_journal(out) if r["kind"] == "metrics"]
    assert steps == sorted(set(steps))
    assert steps[-1] == 12
    run_module("pipeline.sample", str(out), *gpu, "--count", "4", "--out", str(tmp_path / "grid.png"))
    measuring = ["--metrics", "nll,fid", "--images", "16", "--samples", "32", "--features", "trained"]
    said = run_module("pipeline.evaluate", str(out), *gpu, *measuring, "--tracking.uri", "none").stdout
    assert "bits/dim" in said
    assert "fd_digits" in said
