"""Networks whose features image metrics compare."""

import hashlib
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.data.shards import ShardIndex
from pipeline.data.stream import stream
from pipeline.distributed.world import World
from pipeline.errors import InputError
from pipeline.evaluation.resumable import Block
from pipeline.masking import mask
from pipeline.model import from_uint8
from pipeline.storage.backends import StorageConfig
from pipeline.storage.errors import StorageError
from pipeline.storage.store import Store, locate

INCEPTION = "inception-v3-compat"  # torch-fidelity's name for the 2015-12-05 network, bit-exact with TensorFlow's


INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


INCEPTION_SHA256 = "6726825d"  # first digits, as in the file's name


CLASSIFIERS = {"inception", "trained", INCEPTION}  # --features with logits, which the Inception Score needs


CACHE = "evaluation"  # folder next to the shards


Batches = Iterable[Tensor]  # of uint8 [n, C, H, W]


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

    Raises InputError if the weights are unavailable or are not the expected ones.
    """
    path = _inception_path(weights, download, storage)
    _check_inception(str(path), path.read_bytes())
    torch.load(path, weights_only=True)  # torch-fidelity itself would run code in the file
    return torch_fidelity_features(INCEPTION, path, device)


def _check_inception(where: str, data: bytes) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if not digest.startswith(INCEPTION_SHA256):
        raise InputError(f"{where}: not the Inception weights: sha256 {digest[:16]}…, expected {INCEPTION_SHA256}…")


def _inception_path(weights: str | None, download: bool, storage: StorageConfig) -> Path:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(INCEPTION_URL).name
    if weights and "://" not in weights:
        if not Path(weights).is_file():
            raise InputError(f"--inception {weights}: no such file")
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
            raise InputError(
                f"the Inception weights cannot be downloaded here ({error}). Fetch {INCEPTION_URL} elsewhere and pass"
                " its path with --inception, or use --features trained"
            ) from error
    if not cached.exists():
        raise InputError(
            "Image metrics need the Inception weights of 2015-12-05: pass --inception PATH_OR_URL, allow --download,"
            f" put {cached.name} into {cached.parent}, or use a network trained on the data itself: --features trained"
        )
    return cached


def torch_fidelity_features(name: str, weights: Path | None, device: torch.device) -> Features:
    """Load one of torch-fidelity's networks by its registered name; without `weights`, downloads them."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    if name not in FEATURE_EXTRACTORS_REGISTRY:
        have = ", ".join(["inception", "trained", *FEATURE_EXTRACTORS_REGISTRY])
        raise InputError(f"--features: got {name!r}, expected one of {have}")
    kind = FEATURE_EXTRACTORS_REGISTRY[name]
    layers = [kind.get_default_feature_layer_for_metric("fid")]
    if name in CLASSIFIERS:
        layers.append(kind.get_default_feature_layer_for_metric("isc"))
    try:
        extractor = kind(name, layers, feature_extractor_weights_path=weights and str(weights), verbose=False)
    except (URLError, OSError) as error:
        raise InputError(f"--features {name}: its weights cannot be downloaded here ({error})") from error
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
        features = self.hidden(from_uint8(images))
        return features, self.out(features)


def trained_features(data: Store, index: ShardIndex, world: World, steps: int = 500) -> Features:
    """Train a classifier on the dataset's own labels, deterministically, and cache its weights next to the shards.

    For data unlike photographs, and machines without the Inception weights. Raises InputError without class labels.
    """
    if index.num_classes < 2:
        raise InputError("--features trained: needs class labels; this dataset has none")
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
