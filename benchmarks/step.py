"""Compare the training and sampling steps with plain ones: `python -m benchmarks.step`.

The model is the papers' 64x64 network with 32 channels: 3 blocks per level, learned variance; batch 8. "plain" is the
same model and step as the papers describe them (benchmarks/plain.py). The limit is the time of the convolutions alone.
"""

import os
import statistics
import tempfile
import time
from copy import deepcopy
from typing import Annotated

import torch
import tyro
from torch import Tensor

from benchmarks.plain import PlainTraining, plain_unet
from benchmarks.ranks import Steps
from benchmarks.table import Row, in_turns, median_ratio, show
from iddpm.config import DiffusionConfig, UNetConfig
from iddpm.diffusion import Diffusion, Model
from iddpm.flops import count_parameters, train_flops
from iddpm.sampling import ancestral, final
from iddpm.schedule import respace
from pipeline.config import LaunchConfig, TrainConfig
from pipeline.distributed.world import World
from pipeline.hardware import DTYPES, peak_flops
from pipeline.model import autocast
from pipeline.step import TrainState

BATCH = 8
MODEL = UNetConfig(image_size=64, channels=32, num_res_blocks=3)
DIFFUSION = DiffusionConfig(timesteps=4000)
CHAIN = 5
"""Steps of the timed chain."""


def config(precision: str, compiled: bool = False, checkpointed: bool = False) -> TrainConfig:
    return TrainConfig(
        batch_size=BATCH,
        precision=precision,
        checkpoint_activations=checkpointed,
        model=MODEL,
        diffusion=DIFFUSION,
        launch=LaunchConfig(compile=compiled),
        ema_rates=(0.9999,),
    )


def diffusers_step(diffusion: Diffusion) -> "Peer | None":
    try:
        from diffusers import UNet2DModel
    except ImportError:
        return None
    down, up = ("DownBlock2D",) * 2 + ("AttnDownBlock2D",) * 2, ("AttnUpBlock2D",) * 2 + ("UpBlock2D",) * 2
    model = UNet2DModel(
        sample_size=64,
        in_channels=3,
        out_channels=6,
        layers_per_block=3,
        block_out_channels=(32, 64, 96, 128),
        down_block_types=down,
        up_block_types=up,
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=32,
        norm_num_groups=32,
    )
    return Peer(model, diffusion)


class Peer:
    """diffusers' network with the same widths, blocks and attention, trained as usual there."""

    def __init__(self, model: torch.nn.Module, diffusion: Diffusion) -> None:
        self.net, self.diffusion = model, diffusion
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
        self.model: Model = lambda x, t, _: model(x, t).sample

    def step(self, x: Tensor, t: Tensor, noise: Tensor) -> None:
        self.optimizer.zero_grad()
        self.diffusion.training_losses(self.model, x, t, noise).loss.mean().backward()
        self.optimizer.step()


class Convolutions:
    """The model's convolutions run individually, forward and backward: a lower bound for the step."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        self.passes: list[tuple[torch.nn.Module, Tensor, Tensor]] = []
        model = deepcopy(model).to(dtype)
        handles = [m.register_forward_hook(self._add) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
        with torch.no_grad():
            model(torch.randn(BATCH, 3, 64, 64), torch.zeros(BATCH))
        for handle in handles:
            handle.remove()

    def _add(self, layer: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].requires_grad_(bool(self.passes))  # images need no gradient
        self.passes.append((layer, x, torch.randn_like(output)))

    def step(self) -> None:
        for layer, x, grad in self.passes:
            wanted = [p for p in (x, *layer.parameters()) if p.requires_grad]
            torch.autograd.grad(layer(x), wanted, grad)


def rows(rounds: int = 10, compiled: bool = True) -> list[Row]:
    torch.manual_seed(0)
    world, diffusion = World(), Diffusion(DIFFUSION)
    x, noise = torch.randn(BATCH, 3, 64, 64), torch.randn(BATCH, 3, 64, 64)
    t = torch.randint(0, DIFFUSION.timesteps, (BATCH,))
    ours = {
        "fp32": Steps(config("fp32"), world),
        "bf16": Steps(config("bf16"), world),
        "bf16, activations checkpointed": Steps(config("bf16", checkpointed=True), world),
    }
    if compiled:
        for precision in ("fp32", "bf16"):
            ours[f"{precision}, compiled"] = Steps(config(precision, compiled=True), world)
    weights = dict(ours["fp32"].state.model.state_dict())
    plain = PlainTraining(weights, MODEL, diffusion, 1e-4, 0.9999)
    peer = diffusers_step(diffusion)
    ways = {name: way.step for name, way in ours.items()}
    ways["plain"] = lambda: plain.step(x, t, noise)  # type: ignore[assignment]
    for name in ("fp32", "bf16"):
        alone = Convolutions(ours["fp32"].state.model, DTYPES[name])
        ways[f"convolutions, {name}"] = alone.step  # type: ignore[assignment]
    if peer:
        ways["diffusers"] = lambda: peer.step(x, t, noise)  # type: ignore[assignment]
    compiling = 0.0
    if compiled:
        with tempfile.TemporaryDirectory() as cache:  # an empty compile cache
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            start = time.perf_counter()
            ours["bf16, compiled"].step()
            compiling = time.perf_counter() - start
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    seconds = in_turns(ways, rounds)
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    goals = {"fp32": 1.4, "bf16": 3.0}
    found = [
        Row(
            f"train step, {name}",
            f"{middle[name]:.3f} s",
            f"plain fp32 {middle['plain']:.3f} s",
            median_ratio(seconds["plain"], seconds[name]),
            goals.get(name),
        )
        for name in ours
    ]
    flops = BATCH * train_flops(MODEL, 6)
    for name in ("fp32", "bf16"):
        limit = f"convolutions, {name}"
        found.append(
            Row(
                f"limit: {limit}",
                f"{middle[limit]:.3f} s",
                f"plain fp32 {middle['plain']:.3f} s",
                median_ratio(seconds["plain"], seconds[limit]),
            )
        )
        peak = peak_flops(world.device, name)
        reached = flops / min(seconds[name])
        found.append(
            Row(
                f"share of the peak, {name}",
                f"{reached / 1e9:.0f} GFLOP/s",
                f"peak {peak / 1e9:.0f}",
                reached / peak,
            )
        )
    if compiled:
        found.append(Row("compiling", f"{compiling:.0f} s", "60 s", compiling / 60, 1.0, at_most=True))
    if peer:
        size = sum(p.numel() for p in peer.net.parameters()) / 1e6
        found.append(
            Row(
                f"train step, fp32, {count_parameters(MODEL, 6) / 1e6:.1f}M parameters",
                f"{middle['fp32']:.3f} s",
                f"diffusers, {size:.1f}M {middle['diffusers']:.3f} s",
                median_ratio(seconds["diffusers"], seconds["fp32"]),
                1.0,
            )
        )
    return found + _sampling(ours["fp32"].state, rounds)


def _sampling(state: TrainState, rounds: int) -> list[Row]:
    """Time a short chain; the plain loop uses the plain network in fp32."""
    full = state.config.diffusion
    chain = Diffusion(full, keep=respace(full.timesteps, str(CHAIN)))
    with torch.no_grad():  # make the network non-zero, because the chains' results are compared
        for p in state.params.values():
            p.add_(0.02 * torch.randn_like(p))
    plain = plain_unet({name: p.contiguous() for name, p in state.params.items()}, state.config.model)
    x_T = torch.randn(BATCH, 3, 64, 64)

    def draw(model: Model, precision: str = "fp32") -> Tensor:
        with autocast(torch.device("cpu"), precision):
            return final(ancestral(model, chain, x_T, lambda t: x_T.roll(t + 1, 0)))

    state.model.eval()
    # In float64, because a chain amplifies rounding errors and the methods are to be compared.
    exact, small = deepcopy(state.model).double(), x_T[:2].double()
    plain_exact = plain_unet(dict(exact.named_parameters()), state.config.model)
    a, b = (final(ancestral(m, chain, small, lambda t: small.roll(t + 1, 0))) for m in (exact, plain_exact))
    difference = float((a - b).abs().max())
    fused = deepcopy(state.model)
    fused.fuse()
    ways = {
        "plain": lambda: draw(plain),
        "fp32": lambda: draw(state.model),
        "bf16": lambda: draw(state.model, "bf16"),
        "bf16, compiled": lambda: draw(fused, "bf16"),
    }
    seconds = in_turns(ways, rounds)
    rate = {name: BATCH * CHAIN / statistics.median(found) for name, found in seconds.items()}
    return [
        Row(
            f"sampling, {name}",
            f"{rate[name]:.1f} image-steps/s",
            f"plain fp32 {rate['plain']:.1f}",
            median_ratio(seconds["plain"], seconds[name]),
            {"bf16": 2.5}.get(name),
        )
        for name in ("fp32", "bf16", "bf16, compiled")
    ] + [Row("sampling minus plain, in float64", f"{difference:.1e}", "1e-9", difference / 1e-9, 1.0, at_most=True)]


def main(
    rounds: Annotated[int, tyro.conf.arg(help="Measured rounds.")] = 10,
    compiled: Annotated[bool, tyro.conf.arg(help="Also measure the compiled step; takes a minute more.")] = True,
) -> None:
    """Print the table."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(show(rows(rounds, compiled)))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
