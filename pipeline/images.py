"""Images: files -> pixels, pixels -> files, uint8 <-> [-1, 1]."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.errors import InputError


class Unreadable(Exception):
    """A source image cannot be read: it is skipped, and listed at the end."""


def load_image(path: Path, size: int, grey: bool = False) -> np.ndarray:
    """Load an image as uint8 [3 or 1, size, size]. Raises `Unreadable` if the file is not an intact image."""
    try:
        with Image.open(path) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits per pixel
                image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            image = image.convert("L" if grey else "RGB")
    except Exception as error:  # Pillow raises many types on broken files
        raise Unreadable(f"{path}: {error}") from error
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def _read_image(path: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Read an image as uint8 [C, H, W]. Raises InputError if it has another size."""
    channels, height, width = shape
    with Image.open(path) as picture:
        if picture.size != (width, height):
            got = "x".join(map(str, picture.size))
            raise InputError(f"{path}: got an image of {got} pixels, expected the run's {width}x{height}")
        pixels = np.array(picture.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8 0..255."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def grid_png(images: Tensor, columns: int | None = None) -> bytes:
    """Encode uint8 [N, C, H, W] as one nearly square PNG; small images are enlarged to 64 pixels."""
    from torchvision.utils import make_grid

    scale = max(1, 64 // images.shape[2])
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid(large, columns or math.ceil(math.sqrt(len(images))), pad_value=255)
    buffer = io.BytesIO()
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def batch_npz(images: Tensor, labels: Tensor | None = None) -> bytes:
    """Encode uint8 [N, C, H, W] as the guided-diffusion evaluator's sample batch: arr_0 [N, H, W, C], labels arr_1."""
    arrays = [images.permute(0, 2, 3, 1).numpy(), *([labels.numpy()] if labels is not None else [])]
    buffer = io.BytesIO()
    np.savez(buffer, *arrays)
    return buffer.getvalue()
