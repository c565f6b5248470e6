import pytest

from iddpm.config import UNetConfig
from iddpm.flops import count_parameters, forward_flops, train_flops

CIFAR = UNetConfig(image_size=32, channel_mult=(1, 2, 2, 2), dropout=0.3)


@pytest.mark.parametrize(
    ("config", "parameters", "giga_macs"),
    [
        (UNetConfig(channels=64), 30_303_494, 10.04),
        (UNetConfig(channels=96), 68_126_598, 22.43),
        (UNetConfig(channels=128), 121_063_942, 39.74),
        (UNetConfig(channels=192), 272_281_350, 89.09),
        (UNetConfig(channels=192, num_classes=1000), 273_049_350, 89.09),
        (CIFAR, 52_546_438, 8.39),
    ],
)
def test_the_papers_models(config, parameters, giga_macs):
    assert count_parameters(config, 6) == parameters
    assert round(forward_flops(config, 6) / 2e9, 2) == giga_macs


def test_training_costs_three_forward_passes():
    assert train_flops(CIFAR, 6) == 3 * forward_flops(CIFAR, 6)


def test_attention_is_counted():
    without = UNetConfig(image_size=8, channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=())
    with_attention = UNetConfig(
        image_size=8, channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(8,)
    )
    # One block down, two up; qkv and projection take 4 c^2 per pixel, the products 2 c per pair of pixels.
    macs = 3 * (4 * 32**2 * 64 + 2 * 32 * 64**2)
    assert forward_flops(with_attention, 6) - forward_flops(without, 6) == 2 * macs
