"""Image metrics: FID, IS, KID, precision and recall of generated images, from the features of a network.

Values equal torch-fidelity's on the same features. With features other than Inception's, a metric gets another name:
`fd_digits` is a Fréchet distance, but not FID.
"""

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.cache import Cache
from pipeline.data.shards import ShardIndex
from pipeline.data.stream import Reader
from pipeline.distributed.world import World
from pipeline.errors import InputError
from pipeline.evaluation.features import CACHE, Batches, Features, _keep
from pipeline.evaluation.resumable import Block
from pipeline.masking import mask
from pipeline.storage.backends import StorageConfig
from pipeline.storage.store import Store, locate

NEAR = {"kid", "precision", "recall"}  # compare with real images themselves; their moments are not enough


KID_SUBSET = 1000  # images, or all if there are fewer


@dataclass
class Moments:
    """Mean and covariance of vectors accumulated in batches, in float64."""

    count: Tensor
    total: Tensor  # [D]
    square: Tensor  # [D, D]: the sum of x x^T

    @classmethod
    def zero(cls, size: int, device: torch.device) -> "Moments":
        shapes = ((), (size,), (size, size))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, features: Tensor) -> None:
        """Add a batch of vectors [n, D]."""
        x = features.to(self.total)
        self.count += len(x)
        self.total += x.sum(0)
        self.square.addmm_(x.T, x)

    def sum_ranks(self, world: World) -> None:
        for tensor in (self.count, self.total, self.square):
            world.sum_(tensor)

    def mean_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean [D] and unbiased covariance [D, D], float64; raises InputError for fewer than two vectors."""
        n = float(self.count)
        if n < 2:
            raise InputError(f"moments: got {n:.0f} images, expected 2 or more")
        mean = self.total / n
        covariance = (self.square - n * torch.outer(mean, mean)) / (n - 1)
        return mean.cpu().numpy(), covariance.cpu().numpy()


def moments_of(batches: Batches, features: Features, world: World) -> Moments:
    """Return, on every rank, the feature moments over all ranks' images."""
    moments: Moments | None = None

    def own() -> int:
        nonlocal moments
        for images in batches:
            found = features.extract(images)["features"]
            moments = moments or Moments.zero(found.shape[1], features.device)
            moments.add(found)
        return len(moments.total) if moments else 0

    size = max(world.on_all_ranks(own))
    moments = moments or Moments.zero(size, features.device)  # a rank may have no image
    moments.sum_ranks(world)
    return moments


def frechet_distance(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """Fréchet distance of two Gaussians (mean [D], covariance [D, D]); FID on Inception features (Heusel et al. 2017).

    The trace of sqrt(A B) equals that of the root of the symmetric sqrt(A) B sqrt(A), whose eigenvalues have no
    complex rounding errors.
    """
    (mean_a, cov_a), (mean_b, cov_b) = ((torch.from_numpy(np.asarray(x, np.float64)) for x in pair) for pair in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace)


@dataclass(frozen=True)
class Reference:
    """Real images to compare with."""

    digest: str
    """Identifies the images in a passport."""
    moments: tuple[np.ndarray, np.ndarray]
    images: Callable[[int], Batches] | None
    """images(n) yields n of them; None if only moments are known."""


def dataset_reference(data: Store, index: ShardIndex, features: Features, world: World, cache: Cache) -> Reference:
    """Use all images of a split. Their moments are cached next to the shards by the digests of data and network."""
    name = f"{CACHE}/{index.split}-{index.digest}-{features.digest}.npz"

    def kept() -> tuple[np.ndarray, np.ndarray] | None:
        try:
            return read_moments(data.read(name))
        except FileNotFoundError:
            return None

    found = world.on_rank0(kept)
    if found is None:
        own = np.arange(*world.share(index.num_samples))
        found = moments_of(_images(data, index, cache, own), features, world).mean_covariance()
        mean, covariance = found
        world.only_on_rank0(lambda: _keep(data, name, moments_npz(mean, covariance)))
    return Reference(f"{index.split}-{index.digest[:16]}", found, partial(spread_images, data, index, cache))


def spread_images(data: Store, index: ShardIndex, cache: Cache, n: int) -> Iterator[Tensor]:
    """Yield `Batches` of up to n images, evenly spread over a split because shards may be in any order."""
    count = min(n, index.num_samples)
    return _images(data, index, cache, np.arange(count) * index.num_samples // count)


def _images(data: Store, index: ShardIndex, cache: Cache, ids: np.ndarray, batch_size: int = 256) -> Iterator[Tensor]:
    with closing(Reader(data, index, cache)) as reader:
        for start in range(0, len(ids), batch_size):
            yield reader.read(ids[start : start + batch_size])[0]


def npz_reference(
    url: str, storage: StorageConfig, features: Features, world: World, batch_size: int = 256
) -> Reference:
    """Load a reference batch of the guided-diffusion evaluator: arr_0 (uint8 [N, H, W, C]), mu and sigma, or both.

    `url` is a path or URL. mu and sigma only apply to Inception features.
    """
    store, name = locate(url, storage)
    with store.open(name) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        file.seek(0)
        with np.load(file, allow_pickle=False) as npz:
            names = set(npz.files)
            if not names & {"arr_0", "mu"}:
                raise InputError(f"--reference {mask(url)}: got {sorted(names)}, expected arr_0, or mu and sigma")
            if "mu" in names and features.name == "inception":
                moments = npz["mu"], npz["sigma"]
            elif "arr_0" not in names:
                raise InputError(
                    f"--reference {mask(url)}: got only Inception's mu and sigma, expected arr_0 for {features.name}"
                    " features"
                )
            else:
                drawn = npz_images(file, batch_size, world.rank, world.size)
                moments = moments_of(drawn, features, world).mean_covariance()

    def first(n: int) -> Iterator[Tensor]:
        with store.open(name) as file:
            for images in npz_images(file, batch_size):
                yield images[:n]
                n -= len(images)
                if n <= 0:
                    return

    return Reference(f"{name.partition('?')[0]}-{digest}", moments, first if "arr_0" in names else None)


def moments_npz(mean: np.ndarray, covariance: np.ndarray) -> bytes:
    """Encode moments in the guided-diffusion evaluator's format."""
    buffer = io.BytesIO()
    np.savez(buffer, mu=mean, sigma=covariance)
    return buffer.getvalue()


def read_moments(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as npz:
        return npz["mu"], npz["sigma"]


def npz_images(file: IO[bytes], batch_size: int, first: int = 0, every: int = 1) -> Iterator[Tensor]:
    """Yield batches `first`, `first` + `every`, ... of arr_0 (uint8 [N, H, W, C]) as uint8 [n, C, H, W].

    The whole array is never in memory.
    """
    with zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as array:
        version = np.lib.format.read_magic(array)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(array)
        if fortran or dtype != np.uint8 or len(shape) != 4:
            raise InputError(f"--reference: arr_0 is {dtype} {shape}, expected uint8 [N, H, W, C]")
        size = int(np.prod(shape[1:]))
        for number, start in enumerate(range(0, shape[0], batch_size)):
            n = min(batch_size, shape[0] - start)
            pixels = np.frombuffer(array.read(n * size), np.uint8).reshape(n, *shape[1:])
            if number % every == first:
                yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def image_metrics(
    drawn: Sequence[Block], reference: Reference, features: Features, wanted: Iterable[str], k: int
) -> dict[str, tuple[float, dict[str, Any]]]:
    """Compute the `wanted` metrics (of METRICS, without nll) of images that `Features.extract` has encoded.

    Returns each metric's value and its additional passport fields. k is the number of neighbours for precision and
    recall (Kynkäänniemi et al. 2019).
    """
    wanted = set(wanted)
    rows, logits = (torch.cat([block[name] for block in drawn]) for name in ("features", "logits"))
    found: dict[str, tuple[float, dict[str, Any]]] = {}
    if "fid" in wanted:
        mean, _ = reference.moments
        if mean.shape != rows.shape[1:]:
            raise InputError(
                f"reference moments: got {len(mean)} dimensions, expected {rows.shape[1]} for {features.name} features"
            )
        moments = Moments.zero(rows.shape[1], features.device)
        for block in drawn:
            moments.add(block["features"])
        found["fid"] = frechet_distance(moments.mean_covariance(), reference.moments), {}
    real = None
    if wanted & NEAR:
        assert reference.images, "checked before sampling"
        real = torch.cat([features.extract(images)["features"] for images in reference.images(len(rows))])
    return found | feature_metrics(rows, logits, real, wanted, k, features.device)


def feature_metrics(
    drawn: Tensor, logits: Tensor, real: Tensor | None, wanted: set[str], k: int, device: torch.device
) -> dict[str, tuple[float, dict[str, Any]]]:
    """Compute the metrics that need more than moments with torch-fidelity.

    Features are `drawn` [N, D] and `real` [M, D]; logits are [N, K].
    """
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    found: dict[str, tuple[float, dict[str, Any]]] = {}
    if "is" in wanted:
        if not logits.shape[1]:
            raise InputError("is: needs a classifier; these features have no logits")
        found["is"] = isc_features_to_metric(logits)["inception_score_mean"], {}
    if real is not None and "kid" in wanted:
        size = min(KID_SUBSET, len(drawn), len(real))
        value = kid_features_to_metric(drawn, real, kid_subset_size=size, verbose=False)
        found["kid"] = value["kernel_inception_distance_mean"], {"subset": size}
    if real is not None and wanted & {"precision", "recall"}:
        if not 1 <= k < min(len(drawn), len(real)):
            raise InputError(f"--neighbours: got {k}, expected 1 to {min(len(drawn), len(real)) - 1}")
        both = prc_features_to_metric(
            drawn.to(device), real.to(device), prc_neighborhood=k, save_cpu_ram=True, verbose=False
        )
        found |= {name: (both[name], {"k": k, "real": len(real)}) for name in ("precision", "recall") if name in wanted}
    return found
