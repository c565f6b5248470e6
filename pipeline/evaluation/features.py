"""Networks whose features image metrics compare."""

import hashlib
import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.error import URLError

import torch
from safetensors import SafetensorError
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


def _check_inception(where: str, data: bytes) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if not digest.startswith(INCEPTION_SHA256):
        raise InputError(f"{where}: not the Inception weights: sha256 {digest[:16]}…, expected {INCEPTION_SHA256}…")


def _inception_path(weights: str | None, download: bool, storage: StorageConfig) -> Path:
    """Return a local file of the weights; those from elsewhere are first copied to torch's cache."""
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


def pretrained_features(
    name: str, weights: str | None, download: bool, storage: StorageConfig, device: torch.device
) -> Features:
    """Load "inception", the network of 2015-12-05, or another of torch-fidelity's by its registered name.

    `weights` are Inception's, and only with `download` may they come from their publisher. The other networks download
    their own. Raises InputError if the weights are unavailable or are not the expected ones.
    """
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    path = None
    if name == "inception":
        path = _inception_path(weights, download, storage)
        _check_inception(str(path), path.read_bytes())
        torch.load(path, weights_only=True)  # torch-fidelity itself would run code in the file
        name = INCEPTION
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        have = ", ".join(["inception", "trained", *FEATURE_EXTRACTORS_REGISTRY])
        raise InputError(f"--features: got {name!r}, expected one of {have}")
    kind = FEATURE_EXTRACTORS_REGISTRY[name]
    layers = [kind.get_default_feature_layer_for_metric("fid")]
    if name in CLASSIFIERS:
        layers.append(kind.get_default_feature_layer_for_metric("isc"))
    try:
        extractor = kind(name, layers, feature_extractor_weights_path=path and str(path), verbose=False)
    except (URLError, OSError) as error:
        raise InputError(f"--features {name}: its weights cannot be downloaded here ({error})") from error
    extractor = extractor.to(device).eval().requires_grad_(False)

    def network(images: Tensor) -> tuple[Tensor, Tensor]:
        features, *logits = extractor(images.expand(-1, 3, -1, -1).contiguous())
        return features, logits[0] if logits else features[:, :0]

    return Features("inception" if name == INCEPTION else name, _digest(extractor), network, device)


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(index.shape[0], index.num_classes)
    recipe = hashlib.sha256(f"{network}{steps}".encode()).hexdigest()[:8]
    name = f"{CACHE}/features-{index.digest}-{recipe}.safetensors"

    def weights() -> bytes:
        if data.exists(name):
            stored = data.read(name)
            try:
                network.load_state_dict(load(stored))
                return stored
            except (SafetensorError, RuntimeError):
                print(f"warning: {data}/{name} is damaged; training it again", flush=True)
                data.delete(name)
        _train(network, data, index, steps)
        return store_once(data, name, save(network.state_dict()))

    network.load_state_dict(load(world.on_rank0(weights)))
    network = network.to(world.device).eval().requires_grad_(False)
    return Features(short_name(index), _digest(network), network, world.device)


def _train(network: Classifier, data: Store, index: ShardIndex, steps: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the last bits of float32 results depend on it
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    try:
        with closing(stream(data, index, seed=0, position=0, batch_size=128)) as batches:
            for batch in islice(batches, steps):
                _, logits = network(batch.images)
                loss = nn.functional.cross_entropy(logits, batch.labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    finally:
        torch.set_num_threads(threads)


def store_once(store: Store, name: str, data: bytes) -> bytes:
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
    digest = hashlib.sha256(repr(network).encode())
    for name, weight in sorted(network.state_dict().items()):
        digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
