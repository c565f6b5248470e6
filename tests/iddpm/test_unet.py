import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import arrays, error, released, tensor

from iddpm.config import UNetConfig
from iddpm.unet import PRODUCTS_UP_TO, AttentionBlock, GroupNorm, UNet, attention, timestep_embedding

SMALL = UNetConfig(
    image_size=8,
    in_channels=1,
    channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_classes=10,
)


def golden_case(case):
    golden = {name: arrays("unet")[f"{case}/{name}"] for name in ("config", "x", "t", "out", "grad_norm")}
    flags = json.loads(str(golden["config"]))
    size = golden["x"].shape[-1]
    config = UNetConfig(
        image_size=size,
        in_channels=flags["in_channels"],
        channels=flags["model_channels"],
        channel_mult=tuple(flags["channel_mult"]),
        num_res_blocks=flags["num_res_blocks"],
        attention_resolutions=tuple(size // factor for factor in flags["attention_resolutions"]),
        num_heads=flags["num_heads"],
        scale_shift_norm=flags["use_scale_shift_norm"],
        num_classes=flags.get("num_classes"),
    )
    model = UNet(config, flags["out_channels"]).eval()
    state = json.loads(str(arrays("unet")[f"{case}/state_dict"]))
    assert [[name, list(p.shape)] for name, p in model.state_dict().items()] == state
    random = np.random.RandomState(int(arrays("unet")[f"{case}/weights_seed"]))
    weights = {}
    for name, shape in state:
        w = random.randn(*shape) * (0.05 if len(shape) > 1 else 0.1)
        w = w + (1.0 if len(shape) == 1 and name.endswith("weight") else 0.0)
        weights[name] = torch.tensor(w, dtype=torch.float32)
    model.load_state_dict(weights)
    y = arrays("unet").get(f"{case}/y")
    inputs = (torch.tensor(golden["x"]), torch.tensor(golden["t"]), None if y is None else torch.tensor(y))
    return model, inputs, torch.tensor(golden["out"]), torch.tensor(golden["grad_norm"])


def filled(config=SMALL, out_channels=2):
    """A network whose zero-initialised layers are made non-zero."""
    torch.manual_seed(0)
    model = UNet(config, out_channels)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def small_batch(n=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) * 100.5, torch.arange(n) % 10


@pytest.mark.parametrize("case", ["learned_uncond", "fixed_cond_additive"])
def test_outputs_and_gradients_agree_with_the_original(case):
    model, inputs, out, grad_norm = golden_case(case)
    got = model(*inputs)
    assert error(got, out) < 1e-5
    got.square().mean().backward()
    norms = torch.stack([p.grad.double().norm() for p in model.parameters()])
    assert error(norms, grad_norm) < 1e-4


@pytest.mark.parametrize("case", ["learned_uncond", "fixed_cond_additive"])
def test_float64_is_float64(case):
    model, (x, t, y), out, _ = golden_case(case)
    model.double()
    got = model(x.double(), t, y)
    assert got.dtype == torch.float64
    assert error(got, out) < 1e-5


@pytest.mark.parametrize("name", released())
def test_names_shapes_and_order_of_the_published_models(name):
    flags = released()[name]["flags"]
    config = UNetConfig(
        image_size=flags["image_size"],
        channels=flags["num_channels"],
        channel_mult={64: (1, 2, 3, 4), 32: (1, 2, 2, 2)}[flags["image_size"]],
        num_res_blocks=flags["num_res_blocks"],
        attention_resolutions=tuple(int(size) for size in flags["attention_resolutions"].split(",")),
        num_heads=flags["num_heads"],
        scale_shift_norm=flags["use_scale_shift_norm"],
        dropout=flags["dropout"],
        num_classes=1000 if flags["class_cond"] else None,
    )
    with torch.device("meta"):
        model = UNet(config, 6 if flags["learn_sigma"] else 3)
    shapes = [(name, list(p.shape)) for name, p in model.state_dict().items()]
    assert shapes == list(released()[name]["state_dict"].items())
    assert sum(p.numel() for p in model.parameters()) == released()[name]["parameters"]


def test_timestep_embedding_agrees_with_the_original():
    got = timestep_embedding(tensor("timestep_embedding/in"), 32)
    assert error(got, tensor("timestep_embedding/dim=32")) < 1e-5
    assert timestep_embedding(torch.arange(3), 32).dtype == torch.float32
    assert timestep_embedding(torch.arange(3).bfloat16(), 32).dtype == torch.float32
    assert timestep_embedding(torch.arange(3).double(), 32).dtype == torch.float64


def test_starts_as_zero_and_every_block_as_the_identity():
    model = UNet(SMALL, 2)
    x, t, y = small_batch()
    assert torch.equal(model(x, t, y), torch.zeros(2, 2, 8, 8))
    features = torch.randn(2, 64, 4, 4)
    middle = model.middle_block(features, torch.randn(2, 128))
    torch.testing.assert_close(middle, features)


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    block = AttentionBlock(64, num_heads=2)
    torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    x = torch.randn(2, 64, 3, 5)
    pixels = x.flatten(2)
    qkv = block.qkv(block.norm(pixels)).view(2, 2, 96, 15)
    heads = []
    for head in range(2):
        q, k, v = qkv[:, head, :32], qkv[:, head, 32:64], qkv[:, head, 64:]
        weight = torch.softmax(torch.einsum("nct,ncs->nts", q, k) / 32**0.5, dim=-1)
        heads.append(torch.einsum("nts,ncs->nct", weight, v))
    expected = (pixels + block.proj_out(torch.cat(heads, dim=1))).view_as(x)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pixels", [64, PRODUCTS_UP_TO + 1])
def test_attention_in_bfloat16_and_its_gradients_are_near_float32(pixels):
    torch.manual_seed(0)
    wide = [torch.randn(2, 4, pixels, 24, requires_grad=True) for _ in range(3)]
    narrow = [x.detach().bfloat16().requires_grad_() for x in wide]
    expected, got = attention(*wide), attention(*narrow)
    assert got.dtype == torch.bfloat16
    assert error(got.float(), expected) < 0.02
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    for a, b in zip(narrow, wide, strict=True):
        assert error(a.grad.float(), b.grad) < 0.03


def test_examples_do_not_mix_and_timestep_and_label_matter():
    model = filled()
    x, t, y = small_batch(4)
    with torch.no_grad():
        out = model(x, t, y)
        torch.testing.assert_close(model(x[1:3], t[1:3], y[1:3]), out[1:3], rtol=1e-4, atol=1e-5)
        assert error(model(x, t + 50, y), out) > 1e-3
        assert error(model(x, t, (y + 1) % 10), out) > 1e-3


def test_heads_on_the_way_up_are_their_own():
    model = UNet(replace(SMALL, num_heads=2, num_heads_upsample=8), 2)
    ways = [
        {m.num_heads for m in part.modules() if isinstance(m, AttentionBlock)}
        for part in (model.input_blocks, model.middle_block, model.output_blocks)
    ]
    assert ways == [{2}, {2}, {8}]


def test_dropout_is_there_in_training_only():
    model = filled(replace(SMALL, dropout=0.5))
    batch = small_batch()
    assert torch.equal(model(*batch), model(*batch))
    model.train()
    assert not torch.equal(model(*batch), model(*batch))


def test_labels_where_there_should_be_none_and_none_where_some():
    x, t, y = small_batch()
    with pytest.raises(ValueError, match=r"y: got no labels, but model.num_classes is 10"):
        UNet(SMALL, 2)(x, t)
    with pytest.raises(ValueError, match=r"y: got labels, but model.num_classes is None"):
        UNet(replace(SMALL, num_classes=None), 2)(x, t, y)


def test_group_norm_computes_in_float32():
    norm = GroupNorm(32).bfloat16()
    x = (torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0)) + 200).bfloat16()
    out = norm(x)
    assert out.dtype == torch.bfloat16
    assert error(out, torch.nn.functional.group_norm(x.double(), 32)) < 0.01


def test_bfloat16_weights_and_autocast():
    model, batch = filled(), small_batch()
    expected = model(*batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = model(*batch)
    assert 0 < error(under_autocast, expected) < 0.05
    under_autocast.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert error(model.bfloat16()(*batch), expected) < 0.05


def test_channels_last_and_meta():
    model, (x, t, y) = filled(), small_batch()
    expected = model(x, t, y)
    model.to(memory_format=torch.channels_last)
    assert error(model(x.to(memory_format=torch.channels_last), t, y), expected) < 1e-5
    assert model.to("meta")(x.to("meta"), t.to("meta"), y.to("meta")).shape == (2, 2, 8, 8)


def test_checkpointed_activations_give_the_same_gradients_and_keep_less():
    config = replace(SMALL, dropout=0.5)  # recomputation must use the same dropout masks

    def gradients(checkpointed):
        model = filled(config).train()
        model.checkpoint_activations = checkpointed
        kept = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
            loss = model(*small_batch()).square().mean()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}, sum(kept)

    expected, all_kept = gradients(False)
    got, kept = gradients(True)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert kept < all_kept / 2


@pytest.mark.slow
def test_compiled_blocks_give_what_eager_ones_do():
    torch.compiler.reset()
    expected, model, batch = filled(), filled(), small_batch()
    model.fuse()
    assert model.state_dict().keys() == expected.state_dict().keys()
    out, want = model(*batch), expected(*batch)
    assert error(out, want) < 1e-5
    out.square().mean().backward()
    want.square().mean().backward()
    got, wanted = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, expected))
    assert error(got, wanted) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4  # it was compiled
