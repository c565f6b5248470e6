"""Image files -> pixels, and pixels -> image files. Pixels are uint8 [C, H, W]; does not import torch."""

from __future__ import annotations

import errno
import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipeline.errors import InputError

GREY = 128  # between the images of a grid: neither black nor white, which are images' own backgrounds
GAP = 2  # pixels between the images of a grid


class Unreadable(Exception):
    """A file is not an intact image."""


def open_image(path: str | Path, grey: bool) -> Image.Image:
    """Open an image of any mode in RGB or greyscale, rotated by EXIF, transparency flattened on white.

    Raises `Unreadable` if the file is not an intact image.
    """
    try:
        with Image.open(path) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits per pixel
                image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("L" if grey else "RGB")
    except Exception as error:  # Pillow raises many types on broken files
        # A disk or permission error says nothing about the image, which must not be lost for it.
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.ELOOP):
            raise
        raise Unreadable(f"{path}: {error}") from error


def load_image(path: Path, size: int, grey: bool = False) -> np.ndarray:
    """Load an image, its short side reduced to `size` and its centre cropped. Raises `Unreadable` as `open_image`."""
    image = open_image(path, grey)
    # What lies far from the centre has no part in it, and a strip of 1 x 65,000 pixels would become gigabytes.
    image = _centre(image, *(min(side, 8 * min(image.size)) for side in image.size))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return planes(_centre(image, size, size))


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def read_image(path: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Read an image that has this shape (C, H, W). Raises InputError if it has another, or cannot be read."""
    channels, height, width = shape
    try:
        image = open_image(path, grey=channels == 1)
    except Unreadable as error:
        raise InputError(f"{error}; expected an image file") from error
    if image.size != (width, height):
        got = "x".join(map(str, image.size))
        raise InputError(f"{path}: got an image of {got} pixels, expected the run's {width}x{height}")
    return planes(image)


def planes(image: Image.Image) -> np.ndarray:
    """Return an image's pixels, [1, H, W] if it is grey, [3, H, W] if it is RGB."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Lay uint8 images [N, C, H, W] out in rows of `columns`, with grey between and around them: [H', W', 3]."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), GREY, np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)  # grey fills all three channels
    return canvas


def grid_png(images: np.ndarray, columns: int | None = None) -> bytes:
    """Encode uint8 images [N, C, H, W] as one PNG, nearly square by default; small ones are enlarged to 64 pixels."""
    scale = max(1, 64 // images.shape[2])
    enlarged = images.repeat(scale, axis=2).repeat(scale, axis=3)
    picture = grid(enlarged, columns or math.ceil(math.sqrt(len(images))))
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def batch_npz(images: np.ndarray, labels: np.ndarray | None = None) -> bytes:
    """Encode uint8 [N, C, H, W] as the guided-diffusion evaluator's sample batch: arr_0 [N, H, W, C], labels arr_1."""
    arrays = [images.transpose(0, 2, 3, 1)]
    if labels is not None:
        arrays.append(labels)
    buffer = io.BytesIO()
    np.savez(buffer, *arrays)
    return buffer.getvalue()
