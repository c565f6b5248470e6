import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import iddpm
from iddpm.config import DiffusionConfig, UNetConfig

PACKAGE = Path(iddpm.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("channels", 48, "multiple of 32, the number of GroupNorm groups"),
        ("channels", 0, "1 or more"),
        ("image_size", 36, "multiple of 8"),
        ("image_size", -64, "1 or more"),
        ("channel_mult", (), "one or more"),
        ("channel_mult", (1, 0), "each 1 or more"),
        ("num_res_blocks", 0, "1 or more"),
        ("num_heads", 3, "a divisor of 512, the width of level 3"),
        ("num_heads", 5, "a divisor of"),
        ("num_heads_upsample", 7, "a divisor of"),
        ("attention_resolutions", (16, 0), "each 1 or more"),
        ("dropout", 1.0, r"\[0, 1\)"),
        ("dropout", float("nan"), r"\[0, 1\)"),
        ("dropout", "high", "type float"),
        ("channel_mult", 3, "a tuple"),
        ("num_classes", 0, "1 or more"),
        ("in_channels", 0, "1 or more"),
    ],
)
def test_unet_config_says_what_is_wrong(field, value, says):
    with pytest.raises(ValueError, match=rf"--model\.{field.replace('_', '-')}: got .*expected .*{says}"):
        replace(UNetConfig(), **{field: value})


def test_unet_config_takes_small_grey_images():
    UNetConfig(image_size=8, in_channels=1, channels=32, channel_mult=(1, 2), attention_resolutions=(4,))


def test_the_middle_has_attention_in_any_case():
    UNetConfig(attention_resolutions=(), num_heads_upsample=5)
    with pytest.raises(ValueError, match=r"model\.num-heads: got 3, expected a divisor of 512"):
        UNetConfig(attention_resolutions=(), num_heads=3)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("timesteps", 0, "1 or more"),
        ("schedule", "sigmoid", "linear, cosine"),
        ("mean", "eps", "epsilon, x_start, x_prev"),
        ("variance", "large", "fixed_small"),
        ("loss", "l2", "rescaled_kl"),
    ],
)
def test_diffusion_config_says_what_is_wrong(field, value, says):
    with pytest.raises(ValueError, match=rf"--diffusion\.{field}: got .*expected .*{says}"):
        replace(DiffusionConfig(), **{field: value})


def test_linear_schedule_needs_betas_below_one():
    with pytest.raises(ValueError, match=r"diffusion\.timesteps: got 20"):
        DiffusionConfig(timesteps=20, schedule="linear")
    DiffusionConfig(timesteps=21, schedule="linear")


def test_out_channels():
    assert DiffusionConfig(variance="learned").out_channels(3) == 6
    assert DiffusionConfig(variance="learned_range").out_channels(1) == 2
    assert DiffusionConfig(variance="fixed_small").out_channels(3) == 3


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_imports_torch_and_the_standard_library_only(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    light = {"__init__": set(), "bounds": set(), "config": {"iddpm"}}  # these must not import torch
    allowed = light.get(module, {"torch", "iddpm"})
    assert {name.split(".")[0] for name in imported} <= allowed | set(sys.stdlib_module_names)


def test_works_without_numpy_and_loads_nothing_heavy():
    # torch imports numpy if it is available, so numpy is hidden here.
    program = f"""
import sys, warnings
warnings.simplefilter("ignore")
sys.modules["numpy"] = None
import iddpm.config
assert "torch" not in sys.modules
for name in {MODULES}:
    __import__("iddpm." + name)
assert not {{"mlflow", "ray", "pandas", "sklearn"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
