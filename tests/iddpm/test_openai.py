import os
import re
from collections import OrderedDict

import pytest
import torch
from golden import released

from iddpm.config import UNetConfig
from iddpm.openai import load_published
from iddpm.unet import UNet

CIFAR = UNetConfig(image_size=32, channel_mult=(1, 2, 2, 2), dropout=0.3)
SMALL = UNetConfig(image_size=8, channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,))


def test_a_file_of_the_published_names_loads(tmp_path):
    shapes = released()["cifar10_uncond_50M_500K"]["state_dict"]
    # Views of one number: the names and shapes of the 50M model without its 200 MB.
    state = OrderedDict((name, torch.full((), 0.5).expand(shape)) for name, shape in shapes.items())
    torch.save(state, tmp_path / "published.pt")
    loaded = load_published(tmp_path / "published.pt", CIFAR, 6)
    with torch.device("meta"):
        model = UNet(CIFAR, 6)
    model.load_state_dict(loaded, assign=True)
    assert all(p.device.type == "cpu" and p.flatten()[0] == 0.5 for p in model.parameters())


def test_weights_survive_the_file(tmp_path):
    model = UNet(SMALL, 6)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = load_published(str(tmp_path / "model.pt"), SMALL, 6)
    assert all(torch.equal(loaded[name], p) for name, p in model.state_dict().items())


def test_a_wrong_file_says_which_names_and_shapes(tmp_path):
    state = UNet(SMALL, 6).state_dict()
    del state["time_embed.0.bias"]
    state["extra"] = torch.zeros(2, 3)
    state["out.2.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="not the weights of this model config") as raised:
        load_published(tmp_path / "wrong.pt", SMALL, 6)
    for what in (
        str(tmp_path / "wrong.pt"),
        'Missing.*"time_embed.0.bias"',
        'Unexpected.*"extra"',
        "mismatch for out.2.bias",
    ):
        assert re.search(what, str(raised.value))


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    torch.save({"weight": Exploit(tmp_path / "ran")}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="not a checkpoint of tensors only"):
        load_published(tmp_path / "code.pt", SMALL, 6)
    assert not (tmp_path / "ran").exists()
    # The file would do harm if loaded elsewhere:
    torch.load(tmp_path / "code.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pt: not a checkpoint"):
        load_published(tmp_path / "x.pt", SMALL, 6)


def test_a_truncated_file_is_refused(tmp_path):
    torch.save(UNet(SMALL, 6).state_dict(), tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_published(tmp_path / "x.pt", SMALL, 6)


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"step": 3}, torch.zeros(2)])
def test_tensors_that_are_no_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="expected a dict of tensors"):
        load_published(tmp_path / "x.pt", SMALL, 6)


def test_an_absent_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_published(tmp_path / "none.pt", SMALL, 6)
