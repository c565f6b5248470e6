"""Image metrics: FID, IS, KID, precision and recall of generated images, from the features of a network.

Values equal torch-fidelity's on the same features. With features other than Inception's, a metric gets another name:
`fd_digits` is a Fréchet distance, but not FID.
"""

import hashlib
import io
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.error import URLError

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.blocks import Block
from pipeline.data import Cache, Reader, ShardIndex, stream
from pipeline.storage import StorageConfig, StorageError, Store, locate, mask
from pipeline.world import World

NEAR = {"kid", "precision", "recall"}  # compare with real images themselves; their moments are not enough
INCEPTION = "inception-v3-compat"  # torch-fidelity's name for the 2015-12-05 network, bit-exact with TensorFlow's
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d"  # first digits, as in the file's name
CLASSIFIERS = {"inception", "trained", INCEPTION}  # --features with logits, which the Inception Score needs
KID_SUBSET = 1000  # images, or all if there are fewer
CACHE = "evaluation"  # folder next to the shards

Batches = Iterable[Tensor]  # of uint8 [n, C, H, W]


# ------------------------------------------------------------------------------------------ features


@dataclass(frozen=True)
class Features:
    """A network that maps images to feature vectors."""

    name: str
    """"inception", or the suffix of the metrics' names."""
    digest: str
    """Hash of the layers and weights."""
    network: Callable[[Tensor], tuple[Tensor, Tensor]]
    """uint8 [n, C, H, W] -> features [n, D] and logits [n, K] (K = 0 if it is not a classifier)."""
    device: torch.device
    """Device that the network runs on."""

    def metric(self, name: str) -> str:
        """Return the name of a metric over these features."""
        if self.name == "inception":
            return name
        return {"fid": "fd", "kid": "kd"}.get(name, name) + f"_{self.name}"

    @torch.no_grad()
    def extract(self, images: Tensor) -> Block:
        """Compute float32 `features` and `logits` of uint8 images [n, C, H, W]; both are on the CPU."""
        features, logits = self.network(images.to(self.device))
        return {"features": features.float().cpu(), "logits": logits.float().cpu()}


def inception_features(weights: str | None, download: bool, storage: StorageConfig, device: torch.device) -> Features:
    """Load the 2015-12-05 Inception network from a path, a URL, torch's cache or, if allowed, its publisher.

    Raises ValueError if the weights are unavailable or are not the expected ones.
    """
    path = _inception_path(weights, download, storage)
    _check_inception(str(path), path.read_bytes())
    torch.load(path, weights_only=True)  # torch-fidelity itself would run code in the file
    return torch_fidelity_features(INCEPTION, path, device)


def _check_inception(where: str, data: bytes) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if not digest.startswith(INCEPTION_SHA256):
        raise ValueError(f"{where}: not the Inception weights: sha256 {digest[:16]}…, expected {INCEPTION_SHA256}…")


def _inception_path(weights: str | None, download: bool, storage: StorageConfig) -> Path:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(INCEPTION_URL).name
    if weights and "://" not in weights:
        if not Path(weights).is_file():
            raise ValueError(f"--inception {weights}: no such file")
        return Path(weights)
    if weights and not weights.startswith("http"):
        store, name = locate(weights, storage)
        data = store.read(name)
        _check_inception(mask(weights), data)  # before it enters the shared cache
        Store(cached.parent).write(cached.name, data)  # atomic: other ranks may be reading it
    elif weights or (download and not cached.exists()):
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(weights or INCEPTION_URL, str(cached), INCEPTION_SHA256)
        except (URLError, OSError, RuntimeError) as error:
            raise ValueError(
                f"the Inception weights cannot be downloaded here ({error}). Fetch {INCEPTION_URL} elsewhere and pass"
                " its path with --inception, or use --features trained"
            ) from error
    if not cached.exists():
        raise ValueError(
            "Image metrics need the Inception weights of 2015-12-05: pass --inception PATH_OR_URL, allow --download,"
            f" put {cached.name} into {cached.parent}, or use a network trained on the data itself: --features trained"
        )
    return cached


def torch_fidelity_features(name: str, weights: Path | None, device: torch.device) -> Features:
    """Load one of torch-fidelity's networks by its registered name; without `weights`, downloads them."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    if name not in FEATURE_EXTRACTORS_REGISTRY:
        have = ", ".join(["inception", "trained", *FEATURE_EXTRACTORS_REGISTRY])
        raise ValueError(f"--features: got {name!r}, expected one of {have}")
    kind = FEATURE_EXTRACTORS_REGISTRY[name]
    layers = [kind.get_default_feature_layer_for_metric("fid")]
    if name in CLASSIFIERS:
        layers.append(kind.get_default_feature_layer_for_metric("isc"))
    try:
        extractor = kind(name, layers, feature_extractor_weights_path=weights and str(weights), verbose=False)
    except (URLError, OSError) as error:
        raise ValueError(f"--features {name}: its weights cannot be downloaded here ({error})") from error
    extractor = extractor.to(device).eval().requires_grad_(False)

    def network(images: Tensor) -> tuple[Tensor, Tensor]:
        features = extractor(images.expand(-1, 3, -1, -1).contiguous())
        return features[0], features[1] if len(features) > 1 else features[0][:, :0]

    short = "inception" if name == INCEPTION else name
    return Features(short, _digest(extractor), network, device)


class Classifier(nn.Module):
    """A small convolutional image classifier; its last hidden layer provides the features."""

    def __init__(self, channels: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, width),
            nn.ReLU(),
            nn.LayerNorm(width, elementwise_affine=False),  # KID's kernel needs coordinates of about 1
        )
        self.out = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.hidden(images.float() / 127.5 - 1)
        return features, self.out(features)


def trained_features(data: Store, index: ShardIndex, world: World, steps: int = 500) -> Features:
    """Train a classifier on the dataset's own labels, deterministically, and cache its weights next to the shards.

    For data unlike photographs, and machines without the Inception weights. Raises ValueError without class labels.
    """
    if index.num_classes < 2:
        raise ValueError("--features trained: needs class labels; this dataset has none")
    network = Classifier(index.shape[0], index.num_classes)
    recipe = hashlib.sha256(f"{network}{steps}".encode()).hexdigest()[:8]
    name = f"{CACHE}/features-{index.digest}-{recipe}.safetensors"

    def weights() -> bytes:
        try:
            return data.read(name)
        except FileNotFoundError:
            return _keep(data, name, save(_train_classifier(data, index, steps).state_dict()))

    network.load_state_dict(load(world.on_rank0(weights)))
    network = network.to(world.device).eval().requires_grad_(False)
    return Features(short_name(index), _digest(network), network, world.device)


def _train_classifier(data: Store, index: ShardIndex, steps: int) -> Classifier:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the last bits of float32 results depend on it
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = Classifier(index.shape[0], index.num_classes)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        batches = stream(data, index, seed=0, position=0, batch_size=128)
        for _ in range(steps):
            batch = next(batches)
            loss = nn.functional.cross_entropy(network(batch.images)[1], batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        batches.close()
    finally:
        torch.set_num_threads(threads)
    return network


def _keep(store: Store, name: str, data: bytes) -> bytes:
    """Store `data` unless another process has; return what is stored. A read-only store only causes a warning."""
    try:
        return data if store.create(name, data) else store.read(name)
    except StorageError as error:
        warnings.warn(f"{name} is not cached: {error}", stacklevel=2)
        return data


def short_name(index: ShardIndex) -> str:
    """Return a dataset's suffix for metric names: the last word of its source's name before any remark."""
    words = re.findall(r"[a-z0-9]+", index.source.partition("(")[0].lower())
    return words[-1] if words else "data"


def _digest(network: nn.Module) -> str:
    """Hash the weights, and the layers, since some have no weights."""
    digest, state = hashlib.sha256(repr(network).encode()), network.state_dict()
    for name in sorted(state):
        digest.update(name.encode() + state[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------- moments


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
        """Return the mean [D] and unbiased covariance [D, D], float64; raises ValueError for fewer than two vectors."""
        n = float(self.count)
        if n < 2:
            raise ValueError(f"moments: got {n:.0f} images, expected 2 or more")
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


# ----------------------------------------------------------------------------------------- reference


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
                raise ValueError(f"--reference {mask(url)}: got {sorted(names)}, expected arr_0, or mu and sigma")
            if "mu" in names and features.name == "inception":
                moments = npz["mu"], npz["sigma"]
            elif "arr_0" not in names:
                raise ValueError(
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
            raise ValueError(f"--reference: arr_0 is {dtype} {shape}, expected uint8 [N, H, W, C]")
        size = int(np.prod(shape[1:]))
        for number, start in enumerate(range(0, shape[0], batch_size)):
            n = min(batch_size, shape[0] - start)
            pixels = np.frombuffer(array.read(n * size), np.uint8).reshape(n, *shape[1:])
            if number % every == first:
                yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


# ----------------------------------------------------------------------------------------- measuring


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
            raise ValueError(
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
            raise ValueError("is: needs a classifier; these features have no logits")
        found["is"] = isc_features_to_metric(logits)["inception_score_mean"], {}
    if real is not None and "kid" in wanted:
        size = min(KID_SUBSET, len(drawn), len(real))
        value = kid_features_to_metric(drawn, real, kid_subset_size=size, verbose=False)
        found["kid"] = value["kernel_inception_distance_mean"], {"subset": size}
    if real is not None and wanted & {"precision", "recall"}:
        if not 1 <= k < min(len(drawn), len(real)):
            raise ValueError(f"--neighbours: got {k}, expected 1 to {min(len(drawn), len(real)) - 1}")
        both = prc_features_to_metric(
            drawn.to(device), real.to(device), prc_neighborhood=k, save_cpu_ram=True, verbose=False
        )
        found |= {name: (both[name], {"k": k, "real": len(real)}) for name in ("precision", "recall") if name in wanted}
    return found
