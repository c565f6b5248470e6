"""The baseline: the network and training step as the papers describe them, in plain eager PyTorch.

The network is built from the names in a state_dict, so that it is the same model with the same weights: GroupNorm,
SiLU, attention as two matrix products and a softmax, images in NCHW. The optimizer and the moving average loop over the
parameters.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm.config import UNetConfig
from iddpm.diffusion import Diffusion, Model
from iddpm.unet import timestep_embedding

Weights = Mapping[str, Tensor]


def plain_unet(p: Weights, config: UNetConfig) -> Model:
    """Return the network with weights `p`."""
    norm_scale = config.scale_shift_norm

    def conv(name: str, x: Tensor, **how: int) -> Tensor:
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **how)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, p[f"{name}.weight"], p[f"{name}.bias"])

    def block(name: str, x: Tensor, emb: Tensor) -> Tensor:
        h = conv(f"{name}.in_layers.2", F.silu(norm(f"{name}.in_layers.0", x)), padding=1)
        e = linear(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        if norm_scale:
            scale, shift = e.chunk(2, dim=1)
            h = norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = norm(f"{name}.out_layers.0", h + e)
        h = conv(f"{name}.out_layers.3", F.silu(h), padding=1)
        skip = f"{name}.skip_connection"
        return (conv(skip, x) if f"{skip}.weight" in p else x) + h

    def attention(name: str, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        pixels = x.reshape(n, c, -1)
        qkv = F.conv1d(norm(f"{name}.norm", pixels), p[f"{name}.qkv.weight"], p[f"{name}.qkv.bias"])
        q, k, v = qkv.reshape(n * config.num_heads, -1, h * w).chunk(3, dim=1)
        weight = torch.einsum("bct,bcs->bts", q, k) / q.shape[1] ** 0.5
        a = torch.einsum("bts,bcs->bct", weight.softmax(-1), v).reshape(n, c, h * w)
        out = F.conv1d(a, p[f"{name}.proj_out.weight"], p[f"{name}.proj_out.bias"])
        return (pixels + out).reshape(n, c, h, w)

    def stage(name: str, x: Tensor, emb: Tensor) -> Tensor:
        for layer in range(3):
            at = f"{name}.{layer}"
            if f"{at}.in_layers.0.weight" in p:
                x = block(at, x, emb)
            elif f"{at}.qkv.weight" in p:
                x = attention(at, x)
            elif f"{at}.op.weight" in p:
                x = conv(f"{at}.op", x, stride=2, padding=1)
            elif f"{at}.conv.weight" in p:
                x = conv(f"{at}.conv", F.interpolate(x, scale_factor=2, mode="nearest"), padding=1)
            elif f"{at}.weight" in p:
                x = conv(at, x, padding=1)
        return x

    def count(part: str) -> int:
        return 1 + max(int(name.split(".")[1]) for name in p if name.startswith(part))

    def forward(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is None, "unconditional"
        emb = linear("time_embed.2", F.silu(linear("time_embed.0", timestep_embedding(t, config.channels).to(x.dtype))))
        skips = []
        for i in range(count("input_blocks")):
            x = stage(f"input_blocks.{i}", x, emb)
            skips.append(x)
        x = stage("middle_block", x, emb)
        for i in range(count("output_blocks")):
            x = stage(f"output_blocks.{i}", torch.cat([x, skips.pop()], dim=1), emb)
        return conv("out.2", F.silu(norm("out.0", x)), padding=1)

    return forward


class PlainTraining:
    """AdamW and one moving average, one parameter at a time."""

    def __init__(self, weights: Weights, config: UNetConfig, diffusion: Diffusion, lr: float, rate: float) -> None:
        self.params = {
            name: w.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
            for name, w in weights.items()
        }
        self.average = {name: w.detach().clone() for name, w in self.params.items()}
        self.model = plain_unet(self.params, config)
        self.optimizer = torch.optim.AdamW(self.params.values(), lr=lr, weight_decay=0.0, foreach=False, fused=False)
        self.diffusion, self.rate = diffusion, rate

    def step(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.diffusion.training_losses(self.model, x, t, noise).loss.mean()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for name, average in self.average.items():
                average.mul_(self.rate).add_(self.params[name], alpha=1 - self.rate)
        return loss.detach()
