"""One training step, and the state that it changes."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from iddpm.diffusion import Diffusion
from iddpm.ema import EMA
from iddpm.flops import train_flops
from iddpm.noise import normal, stream_key, uniform
from iddpm.timesteps import make_sampler
from pipeline.config import TrainConfig
from pipeline.data.order import epoch_digests
from pipeline.data.shards import ShardIndex
from pipeline.data.stream import Batch
from pipeline.distributed.world import World
from pipeline.errors import PermanentError
from pipeline.model import autocast, build_model, ema_part, from_uint8, input_dtype
from pipeline.run.checkpoint import Parts

QUARTILES = 4


class NonFinite(PermanentError):
    """Training diverged; nothing was saved after the last good checkpoint."""


class TrainState:
    """Everything that changes while a run trains, and nothing else; `parts` is what a checkpoint holds."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config = config
        self.step = 0
        self.epoch_digests: dict[int, int] = {}
        """Epoch -> this rank's share of the digest of the sample ids consumed so far."""
        self.diffusion = Diffusion(config.diffusion, device=world.device)
        self.model = build_model(config).to(world.device)
        self.model.checkpoint_activations = config.checkpoint_activations
        self.model.fuse(config.launch.compile)
        self.params = dict(self.model.named_parameters())
        # The module to differentiate: DDP averages the gradients over the ranks.
        self.network: nn.Module = self.model
        if world.size > 1:
            self.network = DistributedDataParallel(
                self.model,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
            )
        self.ema = EMA(self.params, config.ema_rates)
        self.optimizer = torch.optim.AdamW(
            self.params.values(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        for p in self.params.values():  # created now, so that checkpoints have the same layout before the first step
            self.optimizer.state[p] = {
                "step": torch.zeros((), device=world.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.sampler = make_sampler(config.timestep_sampler, config.diffusion.timesteps, world.device)
        self.means = RunningMeans(world.device)
        self.flops_per_image = train_flops(config.model, config.out_channels)

    def count_samples(self, index: ShardIndex, batch: Batch) -> None:
        """Add a batch's samples to the digests of their epochs."""
        for epoch, digest in epoch_digests(index, batch.index.numpy(), batch.ids.numpy()).items():
            self.epoch_digests[epoch] = self.epoch_digests.get(epoch, 0) + digest

    @property
    def images(self) -> int:
        """Images seen so far: the position in the data."""
        return self.step * self.config.batch_size

    @property
    def flops(self) -> int:
        """FLOPs spent so far, forward and backward."""
        return self.images * self.flops_per_image

    def parts(self) -> Parts:
        """Return the live tensors of a checkpoint, by part and name."""
        moments = {
            f"{key}/{name}": tensor
            for name, p in self.params.items()
            for key, tensor in self.optimizer.state[p].items()
        }
        return {
            "model": {name: p.detach() for name, p in self.params.items()},
            "optimizer": moments,
            "progress": self.sampler.state_dict() | {"metrics": self.means.table},
            **{ema_part(rate): self.ema.weights(rate) for rate in self.config.ema_rates},
        }

    @torch.no_grad()
    def load(self, step: int, parts: Parts, world: World) -> None:
        """Restore a checkpoint that rank 0 has read; the other ranks, whose `parts` are empty, receive it from it."""
        self.step = step
        for part, tensors in self.parts().items():
            if world.rank == 0:
                for name, tensor in tensors.items():
                    tensor.copy_(parts[part][name])
            world.broadcast_(tensors.values())
        if world.rank != 0:
            self.means.reset()  # rank 0 holds the sum over all ranks


class RunningMeans:
    """Sums since the last log line; they stay on the device, so that adding never waits for it."""

    def __init__(self, device: torch.device) -> None:
        # One row per quartile of the timesteps (count, sum of w, wL, w mse, w vb), and one for the steps
        # (count, sum of gradient norms).
        self.table = torch.zeros(QUARTILES + 1, 5, dtype=torch.float64, device=device)
        self.bad_step = torch.full((), torch.iinfo(torch.int64).max, device=device)

    def reset(self) -> None:
        self.table.zero_()

    def add(self, quartile: Tensor, weights: Tensor, losses: list[Tensor | None]) -> None:
        """Add per-example tensors [n]: quartile in 0..3, importance weights, and the losses (loss, mse, vb)."""
        ones = torch.ones_like(weights, dtype=torch.float64)
        columns = [ones, weights.double()]
        columns += [ones * 0 if x is None else (weights * x.detach()).double() for x in losses]
        member = (quartile == torch.arange(QUARTILES, device=quartile.device)[:, None]).double()
        self.table[:QUARTILES] += member @ torch.stack(columns, dim=1)

    def add_step(self, step: int, grad_norm: Tensor) -> None:
        self.table[QUARTILES, 0] += 1
        self.table[QUARTILES, 1] += grad_norm.double()
        finite = grad_norm.isfinite() & self.table.isfinite().all()
        self.bad_step = torch.where(finite, self.bad_step, self.bad_step.clamp(max=step))

    def check_finite(self, world: World) -> None:
        """Raise NonFinite on every rank if a step's loss or gradient was not finite. Waits for the device."""
        step = min(world.gather(int(self.bad_step)))
        if step < torch.iinfo(torch.int64).max:
            raise NonFinite(
                f"step {step}: the loss or the gradient is not finite, so training stopped; the last good checkpoint is"
                " kept. Start again with another --out and a smaller --lr, more --warmup-steps or --precision fp32."
            )

    def read(self, world: World) -> dict[str, float]:
        """Return the means over all ranks since the last call. Waits for the device."""
        *quartiles, steps = world.sum_(self.table.clone()).tolist()
        self.reset()
        names = ("loss", "mse", "vb")
        count = sum(row[0] for row in quartiles)
        means = {f"train/{name}": sum(row[2 + i] for row in quartiles) / count for i, name in enumerate(names)}
        for q, row in enumerate(quartiles):
            if row[0]:
                means |= {f"train/{name}_q{q}": row[2 + i] / row[1] for i, name in enumerate(names)}
        means["train/grad_norm"] = steps[1] / steps[0]
        return means


def train_step(state: TrainState, batch: Batch, world: World) -> None:
    """Advance the state by one step on this rank's share of a global batch. Never waits for the device."""
    config = state.config
    n = config.batch_size
    state.optimizer.zero_grad(set_to_none=True)

    # Every rank draws the timesteps of the whole batch, so that only losses need to be gathered.
    key = stream_key(config.seed, "t")
    everywhere = torch.arange(state.images, state.images + n, device=world.device)
    all_t, all_weights = state.sampler.sample(uniform(key, everywhere))
    share = slice(*world.share(n))
    index, t, weights = everywhere[share], all_t[share], all_weights[share]
    if config.model.dropout:
        torch.manual_seed(stream_key(config.seed, "dropout", state.step, world.rank))

    # Forward and backward, a microbatch at a time.
    x, y = to_device(batch, index, config, world.device)
    size = config.microbatch or len(x)
    cuts = [slice(start, start + size) for start in range(0, len(x), size)]
    done: list[Tensor] = []
    for cut in cuts:
        last = cut is cuts[-1]
        noise = normal(stream_key(config.seed, "noise"), index[cut], x.shape[1:]).to(x.dtype)
        hold = nullcontext() if last or world.size == 1 else state.network.no_sync()  # type: ignore[operator]
        with hold:
            with autocast(world.device, config.precision):
                losses = state.diffusion.training_losses(
                    state.network, x[cut], t[cut], noise, y if y is None else y[cut]
                )
            done.append(losses.loss.detach())
            quartile = t[cut] * QUARTILES // config.diffusion.timesteps
            state.means.add(quartile, weights[cut], list(losses))
            if last and state.sampler.needs_losses:  # overlaps the backward pass
                gather = world.start_gather(torch.cat(done), n)
            # DDP averages over the ranks: undo its division, so that all images weigh the same in uneven shares.
            (losses.loss * weights[cut]).sum().mul(world.size / n).backward()

    # The update of the weights.
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in state.params.values() if p.grad is not None])
    state.step += 1
    state.means.add_step(state.step, grad_norm)
    state.optimizer.step()

    # The update of the timestep sampler, by the losses of the whole batch.
    if state.sampler.needs_losses:
        state.sampler.update(all_t, gather.wait())


def to_device(batch: Batch, index: Tensor, config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Move a batch to the device: images in [-1, 1], randomly flipped, and labels (None if unconditional)."""

    def move(tensor: Tensor) -> Tensor:
        # A GPU copies from pinned memory without waiting.
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

    x = from_uint8(move(batch.images), input_dtype(config))
    if config.data.random_flip:
        flip = uniform(stream_key(config.seed, "flip"), index) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    return x, None if config.model.num_classes is None else move(batch.labels)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of the next step after `step` steps."""
    return config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))
