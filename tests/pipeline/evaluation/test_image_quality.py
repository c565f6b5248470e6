"""Image metrics: torch-fidelity's values on given features, with moments accumulated in batches."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from pipeline.data.cache import Cache
from pipeline.data.shards import load_index
from pipeline.distributed.world import World
from pipeline.errors import InputError
from pipeline.evaluation import features as features_module
from pipeline.evaluation import image_quality as metrics
from pipeline.evaluation.features import (
    Classifier,
    Features,
    pretrained_features,
    trained_features,
)
from pipeline.evaluation.image_quality import (
    Moments,
    Reference,
    dataset_reference,
    frechet_distance,
    image_metrics,
    moments_npz,
    npz_images,
    npz_reference,
    read_moments,
)
from pipeline.evaluation.measured import Measured, check_comparable
from pipeline.images import batch_npz
from pipeline.storage.backends import StorageConfig
from pipeline.storage.store import Store

SHAPE = (1, 8, 8)  # of the digits
CPU = torch.device("cpu")


def features(n: int, seed: int, size: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) * 0.3
    return torch.randn(n, size, generator=generator) @ mix + 0.1 * torch.randn(size, generator=generator)


def streamed(x: torch.Tensor, batch: int = 37) -> Moments:
    moments = Moments(x.shape[1], CPU)
    for part in x.split(batch):
        moments.add(part)
    return moments


@pytest.mark.parametrize(("n", "size"), [(500, 48), (30, 48), (64, 1)])
def test_fid_equals_torch_fidelitys_on_given_features(n: int, size: int) -> None:
    a, b = features(n, 0, size), features(n + 11, 1, size)
    theirs = fid_statistics_to_metric(*map(_statistics, (a, b)), verbose=False)["frechet_inception_distance"]
    ours = frechet_distance(streamed(a).mean_covariance(), streamed(b).mean_covariance())
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert abs(frechet_distance(streamed(a).mean_covariance(), streamed(a).mean_covariance())) < 1e-4


def _statistics(x: torch.Tensor) -> dict[str, np.ndarray]:
    found = fid_features_to_statistics(x)
    return {"mu": found["mu"], "sigma": np.atleast_2d(found["sigma"])}


def test_streaming_moments_are_numpys_for_any_batches() -> None:
    x = features(101, 2) + 40  # a mean far from 0
    for batch in (1, 10, 101):
        mean, covariance = streamed(x, batch).mean_covariance()
        np.testing.assert_allclose(mean, x.double().mean(0).numpy(), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(x.double().numpy(), rowvar=False), atol=1e-9)
    with pytest.raises(ValueError, match="expected 2 or more"):
        streamed(x[:1]).mean_covariance()


def test_the_others_equal_torch_fidelitys_on_given_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "KID_SUBSET", 200)
    a, b, logits = features(300, 0), features(280, 1) + 0.2, features(300, 3)
    got = _of_features(a, logits, b, {"is", "kid", "precision", "recall"})
    near = prc_features_to_metric(a, b, prc_neighborhood=5, verbose=False)
    expected = {
        "is": isc_features_to_metric(logits)["inception_score_mean"],
        "kid": kid_features_to_metric(a, b, kid_subset_size=200, verbose=False)["kernel_inception_distance_mean"],
        "precision": near["precision"],
        "recall": near["recall"],
    }
    assert {name: value for name, (value, _) in got.items()} == pytest.approx(expected, abs=1e-4)
    assert 0 < near["precision"] < 1
    assert got["kid"][1] == {"subset": 200}
    assert got["recall"][1] == {"k": 5, "real": 280}
    assert _of_features(a[:80], logits[:80], b, {"kid"})["kid"][1] == {"subset": 80}
    with pytest.raises(ValueError, match="expected 1 to 4"):
        _of_features(a[:5], logits[:5], b, {"precision"})


def _of_features(drawn: torch.Tensor, logits: torch.Tensor, real: torch.Tensor, names: set[str]) -> metrics.Values:
    reference = Reference("real", streamed(real).mean_covariance(), lambda _: [real])
    given = Features("given", "x", lambda images: (images, images[:, :0]), CPU)
    return image_metrics([{"features": drawn, "logits": logits}], reference, given, names, 5)


# ------------------------------------------------------------------------------- inception's weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file with the published names and shapes, and random weights."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for weight in network.state_dict().values():
        if weight.dim() == 4:  # torch's own initial weights let the images vanish on the way
            torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
    with torch.no_grad():  # and what all images have in common would make them all one class
        common = network(torch.rand(8, 3, 16, 16).mul(255).to(torch.uint8))[0].mean(0)
        torch.nn.init.normal_(network.fc.weight)
        network.fc.weight -= torch.outer(network.fc.weight @ common, common) / common.dot(common)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
def test_the_whole_way_through_inception_is_torch_fidelitys(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", "")
    network = pretrained_features("inception", str(weights), False, StorageConfig(), CPU)
    assert (network.name, network.metric("fid"), network.metric("recall")) == ("inception", "fid", "recall")
    torch.manual_seed(0)
    drawn, real = (torch.rand(20, 3, 4, 4).pow(power).mul(255).to(torch.uint8) for power in (1, 2))
    (tmp_path / "real.npz").write_bytes(batch_npz(real.numpy()))
    reference = npz_reference(str(tmp_path / "real.npz"), StorageConfig(), network, (3, 4, 4), World())
    wanted = ["fid", "is", "kid", "precision", "recall"]
    got = image_metrics([network.extract(images) for images in drawn.split(4)], reference, network, wanted, 3)
    theirs = _theirs(drawn, real, weights)
    for name, value in theirs.items():
        assert got[name][0] == pytest.approx(value, abs=1e-4, rel=1e-4), name
    assert theirs["fid"] > 1
    assert theirs["is"] > 1.1
    assert theirs["kid"] > 0.01
    assert theirs["recall"] < 1


def _theirs(drawn: torch.Tensor, real: torch.Tensor, weights: Path) -> dict[str, float]:
    class Images(torch.utils.data.Dataset):  # torch-fidelity needs items that are images
        def __init__(self, images: torch.Tensor) -> None:
            self.images = images

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, i: int) -> torch.Tensor:
            return self.images[i]

    options = {"fid": True, "isc": True, "kid": True, "prc": True, "kid_subset_size": 20, "cuda": False}
    found = calculate_metrics(
        input1=Images(drawn),
        input2=Images(real),
        **options,
        cache=False,
        verbose=False,
        save_cpu_ram=True,  # without four processes that load what is in memory
        feature_extractor="inception-v3-compat",
        feature_layer_prc="2048",
        feature_extractor_weights_path=str(weights),
    )
    names = {
        "frechet_inception_distance": "fid",
        "inception_score_mean": "is",
        "kernel_inception_distance_mean": "kid",
        "precision": "precision",
        "recall": "recall",
    }
    return {ours: found[theirs] for theirs, ours in names.items()}


def test_other_weights_than_inceptions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"not the Inception weights: sha256 .* expected 6726825d"):
        pretrained_features("inception", str(path), False, StorageConfig(), CPU)
    with pytest.raises(ValueError, match="no such file"):
        pretrained_features("inception", str(tmp_path / "none.pth"), False, StorageConfig(), CPU)


def test_weights_that_are_not_there_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"--inception PATH_OR_URL, allow --download.*--features trained"):
        pretrained_features("inception", None, False, StorageConfig(), CPU)
    # Nothing listens there, as on a machine without a network.
    monkeypatch.setattr(features_module, "INCEPTION_URL", "http://127.0.0.1:9/weights.pth")
    with pytest.raises(ValueError, match=r"cannot be downloaded here \(.*pass its path with --inception"):
        pretrained_features("inception", None, True, StorageConfig(), CPU)


def test_a_network_of_no_such_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of inception, trained, .*dinov2"):
        pretrained_features("nonsense", None, False, StorageConfig(), CPU)


# ---------------------------------------------------------------------------------- trained features


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, digits: str) -> tuple[Store, Features]:
    """Return a copy of the digits, and features trained on it."""
    folder = tmp_path_factory.mktemp("own") / "data"
    shutil.copytree(digits, folder, ignore=shutil.ignore_patterns("evaluation"))
    store = Store(str(folder))
    return store, trained_features(store, load_index(store, "train"), World())


def digits_of(store: Store, split: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    from readers import samples

    return samples(store, load_index(store, split), range(n))


def test_it_knows_the_digits_and_is_learnt_once(own: tuple[Store, Features]) -> None:
    store, network = own
    assert network.metric("fid") == "fd_digits"
    assert network.metric("kid") == "kd_digits"
    assert network.metric("precision") == "precision_digits"
    images, labels = digits_of(store, "val", 300)
    assert (network.network(images)[1].argmax(1) == labels).float().mean() > 0.9
    (name,) = [name for name in store.list("evaluation/") if name.endswith(".safetensors")]
    index = load_index(store, "train")
    assert index.digest in name
    kept = store.read(name)
    assert trained_features(store, index, World()).digest == network.digest
    # Other layers give another digest, even with the same weights.
    changed = nn.Sequential(*Classifier(1, 10).hidden[:-1])
    assert features_module._digest(changed) != features_module._digest(nn.Sequential(*changed, nn.ReLU()))
    # Training again gives identical bits.
    store.delete(name)
    assert trained_features(store, index, World()).digest == network.digest
    assert store.read(name) == kept


def test_distances_tell_real_images_from_noise(own: tuple[Store, Features], tmp_path: Path) -> None:
    store, network = own
    reference = dataset_reference(store, load_index(store, "train"), network, World(), Cache(tmp_path, 10**9))
    real, _ = digits_of(store, "val", 200)
    noise = torch.randint(0, 256, real.shape).to(torch.uint8)
    wanted = ["fid", "kid", "precision", "recall"]
    near, far = (image_metrics([network.extract(x)], reference, network, wanted, 3) for x in (real, noise))
    for name in ("fid", "kid"):
        assert near[name][0] < 0.1 * far[name][0], name
    for name in ("precision", "recall"):
        assert near[name][0] > 0.5
    assert far["precision"][0] < 0.2


def test_reference_moments_are_kept_beside_the_shards(
    own: tuple[Store, Features], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, network = own
    index = load_index(store, "val")
    first = dataset_reference(store, index, network, World(), Cache(tmp_path, 10**9))
    name = f"evaluation/val-{index.digest}-{network.digest}.npz"
    for there, here in zip(read_moments(store.read(name), name), first.moments, strict=True):
        np.testing.assert_array_equal(there, here)
    images, _ = digits_of(store, "val", index.num_samples)
    expected = streamed(network.network(images)[0]).mean_covariance()
    np.testing.assert_allclose(first.moments[1], expected[1], atol=1e-6)
    monkeypatch.setattr(metrics, "moments_of", None)  # must not be computed again
    again = dataset_reference(store, index, network, World(), Cache(tmp_path, 10**9))
    np.testing.assert_array_equal(again.moments[0], first.moments[0])


def test_reference_batches_of_the_guided_diffusion_evaluator(own: tuple[Store, Features], tmp_path: Path) -> None:
    store, network = own
    images, _ = digits_of(store, "val", 50)
    path = tmp_path / "reference.npz"
    path.write_bytes(batch_npz(images.numpy()))
    with path.open("rb") as file:
        batches = list(npz_images(file, 16))
        assert [len(batch) for batch in batches] == [16, 16, 16, 2]
        assert torch.equal(torch.cat(batches), images)
        every_third = list(npz_images(file, 16, 1, 3))  # rank 1's share of 3 ranks
        assert len(every_third) == 1
        assert torch.equal(every_third[0], images[16:32])
    reference = npz_reference(str(path), StorageConfig(), network, SHAPE, World())
    expected = streamed(network.extract(images)["features"]).mean_covariance()
    np.testing.assert_allclose(reference.moments[1], expected[1], atol=1e-9)
    assert reference.images
    assert torch.equal(torch.cat(list(reference.images(20))), images[:20])

    both = tmp_path / "both.npz"
    np.savez(both, arr_0=images.permute(0, 2, 3, 1).numpy(), mu=np.ones(64), sigma=np.eye(64), mu_s=0, sigma_s=0)
    inception = Features("inception", "x", network.network, CPU)
    np.testing.assert_array_equal(
        npz_reference(str(both), StorageConfig(), inception, SHAPE, World()).moments[0], np.ones(64)
    )
    moments = tmp_path / "moments.npz"
    moments.write_bytes(moments_npz(np.ones(64), np.eye(64)))
    assert npz_reference(str(moments), StorageConfig(), inception, SHAPE, World()).images is None
    with pytest.raises(ValueError, match="got only Inception's mu and sigma, expected arr_0 for digits features"):
        npz_reference(str(moments), StorageConfig(), network, SHAPE, World())


@pytest.mark.parametrize("kind", ["memory", "http"])
def test_a_reference_batch_may_be_anywhere(own: tuple[Store, Features], tmp_path: Path, kind: str) -> None:
    store, network = own
    images, _ = digits_of(store, "val", 30)
    (tmp_path / "reference.npz").write_bytes(batch_npz(images.numpy()))
    here = npz_reference(str(tmp_path / "reference.npz"), StorageConfig(), network, SHAPE, World())
    with _served(tmp_path) if kind == "http" else nullcontext("memory://references") as url:
        if kind == "memory":
            Store(url).write("reference.npz", batch_npz(images.numpy()))
        there = npz_reference(f"{url}/reference.npz", StorageConfig(), network, SHAPE, World())
        assert there.images
        assert torch.equal(torch.cat(list(there.images(25))), images[:25])
        with pytest.raises(FileNotFoundError, match=r"none\.npz does not exist"):
            npz_reference(f"{url}/none.npz", StorageConfig(), network, SHAPE, World())
    assert there.digest == here.digest
    np.testing.assert_array_equal(there.moments[1], here.moments[1])


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """Yield the URL of a web server that serves the folder."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_nothing_in_a_reference_batch_is_unpickled(own: tuple[Store, Features], tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, mu=np.array([{"x": 1}], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="allow_pickle"):
        npz_reference(str(path), StorageConfig(), Features("inception", "x", own[1].network, CPU), SHAPE, World())
    np.savez(path, arr_0=np.zeros((4, 8, 8, 1), np.float32))
    with pytest.raises(ValueError, match=re.escape("arr_0 is float32 (4, 8, 8, 1), expected uint8")):
        npz_reference(str(path), StorageConfig(), own[1], SHAPE, World())


def test_a_store_that_is_read_only_only_costs_time(
    own: tuple[Store, Features], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.storage.errors import StorageError

    store, network = own

    def refuse(*_: Any) -> bool:
        raise StorageError("read-only")

    index = load_index(store, "val")
    store.delete(f"evaluation/val-{index.digest}-{network.digest}.npz")
    monkeypatch.setattr(Store, "create", refuse)
    with pytest.warns(UserWarning, match="not cached: read-only"):
        reference = dataset_reference(store, index, network, World(), Cache(tmp_path, 10**9))
    assert reference.moments[0].shape == (64,)


# ------------------------------------------------------------------------------------------ passports

PASSPORT = {"n": 50_000, "ema": 0.9999, "sampler": "ancestral", "steps": 250, "eta": 0.0, "seed": 0, "k": 3}


@pytest.mark.parametrize("field", [*PASSPORT, "reference"])
def test_numbers_of_different_passports_are_not_compared(field: str) -> None:
    a = Measured("fid", 3.0, 1000, PASSPORT)
    check_comparable(a, Measured("fid", 2.5, 2000, dict(PASSPORT)))
    other = Measured("fid", 2.0, 1000, PASSPORT | {field: "other"})
    with pytest.raises(ValueError, match=f"not comparable: they differ in {field}: .* and other"):
        check_comparable(a, other)
    with pytest.raises(ValueError, match="fid and fd_digits"):
        check_comparable(a, Measured("fd_digits", 2.0, 1000, PASSPORT))


def test_a_number_says_what_it_is() -> None:
    text = str(Measured("nll", 3.5, 10, {"n": 64}, 0.1))
    assert re.search(r"nll +3\.5000 \+- 0\.1000 \(95 %: 3\.3040 to 3\.6960\) +\[n 64\]", text)


IMAGES = np.zeros((4, 8, 8, 1), np.uint8)
MEAN, COVARIANCE = np.zeros(64), np.eye(64)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"arr_0": np.zeros((4, 9, 9, 1), np.uint8)}, r"4 images of \[9, 9, 1\] .* of \[8, 8, 1\]"),
        ({"arr_0": np.zeros((4, 1, 8, 8), np.uint8)}, r"4 images of \[1, 8, 8\]"),  # channels first
        ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8)}, r"4 images of \[8, 8, 3\]"),
        ({"arr_0": IMAGES[:1]}, "1 images"),
        ({"mu": MEAN}, "sigma is not a file in the archive"),
        ({"mu": MEAN, "sigma": COVARIANCE * np.nan}, "mu or sigma is not finite"),
        ({"mu": MEAN, "sigma": COVARIANCE[:3]}, r"mu \[64\] and sigma \[3, 64\], expected \[D\] and \[D, D\]"),
        ({"x": MEAN}, r"got \['x'\], expected arr_0, or mu and sigma"),
        ("cut", "expected an intact .npz file"),
        ("npy", "expected an intact .npz file"),
        ("flipped", "expected an intact .npz file"),
    ],
)
def test_a_reference_that_does_not_fit_is_one_error_with_its_path(
    own: tuple[Store, Features], tmp_path: Path, content: dict[str, np.ndarray] | str, says: str
) -> None:
    path = tmp_path / "reference.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content == "npy":
        with path.open("wb") as file:
            np.save(file, IMAGES)
    else:
        np.savez(path, arr_0=np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1))
        data = bytearray(path.read_bytes())
        data[300] ^= 1
        path.write_bytes(data if content == "flipped" else data[:-30])
    network = Features("inception" if "mu" in content else own[1].name, "x", own[1].network, CPU)
    with pytest.raises(InputError, match=f"^--reference {path}: .*{says}"):
        npz_reference(str(path), StorageConfig(), network, SHAPE, World())


def test_damaged_caches_are_made_again(own: tuple[Store, Features], tmp_path: Path, capsys) -> None:
    store = Store(shutil.copytree(own[0].local, tmp_path / "data"))
    index = load_index(store, "train")
    cache = Cache(tmp_path / "cache", 10**9)
    network = trained_features(store, index, World(), steps=2)
    reference = dataset_reference(store, index, network, World(), cache)
    for name in store.list("evaluation/"):
        store.write(name, store.read(name)[:-40])
    again = trained_features(store, index, World(), steps=2)
    assert again.digest == network.digest
    moments = dataset_reference(store, index, again, World(), cache).moments
    np.testing.assert_array_equal(moments[1], reference.moments[1])
    assert capsys.readouterr().out.count("warning: ") == 2
