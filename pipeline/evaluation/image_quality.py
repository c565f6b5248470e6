"""Image metrics: FID, IS, KID, precision and recall of generated images, from the features of a network.

Values equal torch-fidelity's on the same features. With features other than Inception's, a metric gets another name:
`fd_digits` is a Fréchet distance, but not FID.
"""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.data.cache import Cache
from pipeline.data.shards import ShardIndex
from pipeline.data.stream import Reader
from pipeline.distributed.world import World
from pipeline.errors import InputError
from pipeline.evaluation.features import CACHE, Batches, Features, store_once
from pipeline.evaluation.resumable import Block
from pipeline.masking import mask
from pipeline.storage.backends import StorageConfig
from pipeline.storage.store import Store, locate

NEAR = {"kid", "precision", "recall"}  # compare with real images themselves; their moments are not enough


KID_SUBSET = 1000  # images, or all if there are fewer


MeanCovariance = tuple[np.ndarray, np.ndarray]  # [D] and [D, D]


Values = dict[str, tuple[float, dict[str, Any]]]  # each metric's value, and what it adds to the passport


class Moments:
    """Mean and covariance of vectors accumulated in batches, in float64."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.table = torch.zeros(size + 1, size + 1, dtype=torch.float64, device=device)
        """[D + 1, D + 1]: the sum of (1, x) (1, x)^T, whose first row is the number of vectors and their sum."""

    def add(self, features: Tensor) -> None:
        """Add a batch of vectors [n, D]."""
        rows = pad(features.to(self.table), (1, 0), value=1.0)
        self.table.addmm_(rows.T, rows)

    def mean_covariance(self) -> MeanCovariance:
        """Return the mean [D] and unbiased covariance [D, D], float64; raises InputError for fewer than two vectors."""
        n = float(self.table[0, 0])
        if n < 2:
            raise InputError(f"moments: got {n:.0f} images, expected 2 or more")
        mean = self.table[0, 1:] / n
        covariance = (self.table[1:, 1:] - n * torch.outer(mean, mean)) / (n - 1)
        return mean.cpu().numpy(), covariance.cpu().numpy()


def moments_of(batches: Batches, features: Features, world: World) -> Moments:
    """Return, on every rank, the feature moments over all ranks' images."""

    moments: Moments | None = None

    def add_share() -> int:
        nonlocal moments
        size = 0
        for images in batches:
            rows = features.extract(images)["features"]
            size = rows.shape[1]
            moments = moments or Moments(size, features.device)
            moments.add(rows)
        return size

    size = max(world.on_all_ranks(add_share))
    moments = moments or Moments(size, features.device)  # a rank may have no image
    world.sum_(moments.table)
    return moments


def frechet_distance(a: MeanCovariance, b: MeanCovariance) -> float:
    """Fréchet distance of two Gaussians (mean [D], covariance [D, D]); FID on Inception features (Heusel et al. 2017).

    The trace of sqrt(A B) equals that of the root of the symmetric sqrt(A) B sqrt(A), whose eigenvalues have no
    complex rounding errors.
    """
    mean_a, cov_a, mean_b, cov_b = (torch.from_numpy(np.asarray(x, np.float64)) for x in (*a, *b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace)


@dataclass(frozen=True)
class Reference:
    """Real images to compare with."""

    digest: str
    """Identifies the images in a passport."""
    moments: MeanCovariance
    images: Callable[[int], Batches] | None
    """images(n) yields n of them; None if only moments are known."""


def dataset_reference(data: Store, index: ShardIndex, features: Features, world: World, cache: Cache) -> Reference:
    """Use all images of a split. Their moments are cached next to the shards by the digests of data and network."""
    name = f"{CACHE}/{index.split}-{index.digest}-{features.digest}.npz"

    def cached() -> MeanCovariance | None:
        if not data.exists(name):
            return None
        try:
            return read_moments(data.read(name), f"{data}/{name}")
        except InputError as error:
            print(f"warning: {error}; computing it again", flush=True)
            data.delete(name)
            return None

    moments = world.on_rank0(cached)
    if moments is None:
        share = np.arange(*world.share(index.num_samples))
        moments = moments_of(_images(data, index, cache, share), features, world).mean_covariance()
        content = moments_npz(*moments)
        world.only_on_rank0(lambda: store_once(data, name, content))
    return Reference(f"{index.split}-{index.digest[:16]}", moments, partial(spread_images, data, index, cache))


def spread_images(data: Store, index: ShardIndex, cache: Cache, n: int) -> Iterator[Tensor]:
    """Yield `Batches` of up to n images, evenly spread over a split because shards may be in any order."""
    count = min(n, index.num_samples)
    return _images(data, index, cache, np.arange(count) * index.num_samples // count)


def _images(data: Store, index: ShardIndex, cache: Cache, ids: np.ndarray, batch_size: int = 256) -> Iterator[Tensor]:
    with closing(Reader(data, index, cache)) as reader:
        for start in range(0, len(ids), batch_size):
            yield reader.read(ids[start : start + batch_size])[0]


def npz_reference(
    url: str,
    storage: StorageConfig,
    features: Features,
    shape: tuple[int, int, int],
    world: World,
    batch_size: int = 256,
) -> Reference:
    """Load a reference batch of the guided-diffusion evaluator: arr_0 (uint8 [N, H, W, C]), mu and sigma, or both.

    `url` is a path or URL, `shape` (C, H, W) the model's. mu and sigma only apply to Inception features. Raises
    InputError, before any image is drawn, if the file is damaged or does not fit.
    """
    store, name = locate(url, storage)
    where = f"--reference {mask(url)}"
    with store.open(name) as file, _npz_errors(where):
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        file.seek(0)
        names = {Path(member).stem for member in zipfile.ZipFile(file).namelist()}
        if "arr_0" in names:
            count, *got = npz_shape(file)
            expected = [*shape[1:], shape[0]]
            if got != expected or count < 2:
                raise InputError(f"arr_0 has {count} images of {got} (H, W, C), expected 2 or more of {expected}")
        if "mu" in names and features.name == "inception":
            file.seek(0)
            moments = read_moments(file.read(), where)
        elif "arr_0" in names:
            share = npz_images(file, batch_size, world.rank, world.size)
            moments = moments_of(share, features, world).mean_covariance()
        elif "mu" in names:
            raise InputError(f"got only Inception's mu and sigma, expected arr_0 for {features.name} features")
        else:
            raise InputError(f"got {sorted(names)}, expected arr_0, or mu and sigma")

    def first(n: int) -> Iterator[Tensor]:
        with store.open(name) as file:
            yield from npz_images(file, batch_size, most=n)

    return Reference(f"{name.partition('?')[0]}-{digest}", moments, first if "arr_0" in names else None)


def moments_npz(mean: np.ndarray, covariance: np.ndarray) -> bytes:
    """Encode moments in the guided-diffusion evaluator's format."""
    buffer = io.BytesIO()
    np.savez(buffer, mu=mean, sigma=covariance)
    return buffer.getvalue()


def read_moments(data: bytes, where: str) -> MeanCovariance:
    """Read a mean [D] and a covariance [D, D] that `moments_npz` or another evaluator wrote.

    Raises InputError, which names `where` they are, if they are damaged or not finite.
    """
    with _npz_errors(where), np.load(io.BytesIO(data), allow_pickle=False) as npz:
        mean, covariance = npz["mu"], npz["sigma"]
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
            got = f"mu {list(mean.shape)} and sigma {list(covariance.shape)}"
            raise InputError(f"got {got}, expected [D] and [D, D]")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise InputError("mu or sigma is not finite")
    return mean, covariance


@contextmanager
def _npz_errors(where: str) -> Iterator[None]:
    """Name the file in the errors of reading an .npz."""
    try:
        yield
    except zipfile.BadZipFile as error:
        raise InputError(f"{where}: expected an intact .npz file: {error}") from error
    except (ValueError, KeyError, EOFError, zlib.error) as error:
        if str(error).startswith(where):  # named already
            raise
        raise InputError(f"{where}: {error}") from error


def npz_images(
    file: IO[bytes], batch_size: int, first: int = 0, every: int = 1, most: int | None = None
) -> Iterator[Tensor]:
    """Yield batches `first`, `first` + `every`, ... of arr_0 (uint8 [N, H, W, C]) as uint8 [n, C, H, W].

    `most` limits N; the whole array is never in memory.
    """
    with zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as array:
        shape = _read_header(array)
        size = int(np.prod(shape[1:]))
        count = shape[0] if most is None else min(most, shape[0])
        for number, start in enumerate(range(0, count, batch_size)):
            n = min(batch_size, count - start)
            pixels = np.frombuffer(array.read(n * size), np.uint8).reshape(n, *shape[1:])
            if number % every == first:
                yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def npz_shape(file: IO[bytes]) -> tuple[int, ...]:
    """Return the shape of arr_0 without reading it. Raises InputError unless it is uint8 [N, H, W, C]."""
    with zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as array:
        return _read_header(array)


def _read_header(array: IO[bytes]) -> tuple[int, ...]:
    version = np.lib.format.read_magic(array)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(array)
    if fortran or dtype != np.uint8 or len(shape) != 4:
        raise InputError(f"arr_0 is {dtype} {shape}, expected uint8 [N, H, W, C]")
    return shape


def image_metrics(
    drawn: Sequence[Block], reference: Reference, features: Features, metrics: Collection[str], neighbours: int
) -> Values:
    """Compute metrics (of METRICS, without nll) of images that `Features.extract` has encoded.

    `neighbours` is the k of precision and recall (Kynkäänniemi et al. 2019). All but fid are torch-fidelity's.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    values: Values = {}
    rows = torch.cat([block["features"] for block in drawn])
    if "fid" in metrics:
        mean, _ = reference.moments
        if mean.shape != rows.shape[1:]:
            raise InputError(
                f"reference moments: got {len(mean)} dimensions, expected {rows.shape[1]} for {features.name} features"
            )
        moments = Moments(rows.shape[1], features.device)
        for block in drawn:
            moments.add(block["features"])
        values["fid"] = frechet_distance(moments.mean_covariance(), reference.moments), {}
    if "is" in metrics:
        logits = torch.cat([block["logits"] for block in drawn])
        values["is"] = isc_features_to_metric(logits)["inception_score_mean"], {}
    if NEAR.isdisjoint(metrics):
        return values

    # The others compare with as many real images, or all if there are fewer.
    assert reference.images, "checked before sampling"
    real = torch.cat([features.extract(images)["features"] for images in reference.images(len(rows))])
    fewest = min(len(rows), len(real))
    if "kid" in metrics:
        size = min(KID_SUBSET, fewest)
        kid = kid_features_to_metric(rows, real, kid_subset_size=size, verbose=False)
        values["kid"] = kid["kernel_inception_distance_mean"], {"subset": size}
    near = [name for name in ("precision", "recall") if name in metrics]
    if near:
        if neighbours >= fewest:
            raise InputError(f"--neighbours: got {neighbours}, expected 1 to {fewest - 1}")
        both = (rows.to(features.device), real.to(features.device))
        prc = prc_features_to_metric(*both, prc_neighborhood=neighbours, save_cpu_ram=True, verbose=False)
        values |= {name: (prc[name], {"k": neighbours, "real": len(real)}) for name in near}
    return values
