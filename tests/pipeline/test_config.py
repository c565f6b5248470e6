"""The command line: precedence, errors that say what to do, and records without secrets."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
import yaml
from conftest import ROOT, run_train

from pipeline.cli import flags_of, parse_train
from pipeline.config import (
    LaunchConfig,
    StorageConfig,
    TrackingConfig,
    TrainConfig,
    check_same_run,
    flatten,
    from_record,
    horizon_steps,
    parse_horizon,
    record,
)
from pipeline.errors import InputError
from pipeline.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_parses_to_itself_and_survives_its_record(name: str) -> None:
    config, dry_run = parse_train(["--preset", name])
    assert config == PRESETS[name]
    assert not dry_run
    assert from_record(yaml.safe_load(yaml.safe_dump(record(config)))) == config


CHANGED = replace(
    PRESETS["imagenet64-cond"],
    lr=1 / 3,
    ema_rates=(0.99, 0.9999),
    precision="bf16",
    keep_every=None,
    checkpoint_activations=True,
    horizon="1e+18flops",
    model=replace(PRESETS["imagenet64"].model, num_heads_upsample=2, scale_shift_norm=False, attention_resolutions=()),
    diffusion=replace(PRESETS["imagenet64"].diffusion, rescale_timesteps=False, loss="kl"),
    data=replace(PRESETS["imagenet64"].data, url="s3://bucket/a folder", random_flip=True),
    storage=StorageConfig(endpoint_url="http://127.0.0.1:8333", profile="p", deadline_s=1e-05),
    tracking=TrackingConfig(uri="none", experiment="a study", name="1x2-0", parent="0123", flush_s=0.0),
    launch=LaunchConfig("ray", workers=4, device="cpu", compile=True),
)


@pytest.mark.parametrize("config", [*PRESETS.values(), CHANGED])
def test_a_configuration_is_what_its_flags_give(config: TrainConfig) -> None:
    assert parse_train(flags_of(config)) == (config, False)


def test_no_flags_is_the_digits_preset() -> None:
    assert parse_train([])[0] == PRESETS["digits"]


def test_presets_are_the_papers() -> None:
    cond = PRESETS["imagenet64-cond"]
    assert (cond.model.channels, cond.lr, cond.batch_size) == (192, 3e-4, 2048)
    assert not cond.diffusion.rescale_timesteps
    assert PRESETS["cifar10"].model.dropout == 0.3
    assert PRESETS["study-64"].lr == pytest.approx(1e-4 / 0.5**0.5)


def test_preset_under_yaml_under_flags(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "lr: 0.5\nbatch_size: 64\nema_rates: [0.9, 0.99]\nlaunch: {workers: 3}\n"
        "model: {channels: 64, scale_shift_norm: false, num_classes: null}\n"
    )
    config, _ = parse_train(["--preset", "cifar10", f"--config={file}", "--lr", "0.25"])
    assert (config.lr, config.batch_size, config.ema_rates) == (0.25, 64, (0.9, 0.99))
    assert (config.model.channels, config.model.scale_shift_norm, config.model.num_classes) == (
        64,
        False,
        None,
    )
    assert config.launch.workers == 3
    assert config.model.dropout == 0.3  # the preset's


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--modle.channels", "96"], "--model.channels"),
        (["--model.channels", "97"], "multiple of 32"),
        (["--model.channels", "many"], "many"),
        (["--preset", "imagenet65"], "imagenet64"),
        (["--preset"], "expected one argument"),
        (["--horizon", "3epochs"], "4000steps"),
        (["--horizon", "-3steps"], "positive"),
        (["--batch-size", "0"], "--batch-size"),
        (["--lr", "nan"], "--lr: got nan, expected a positive number"),
        (["--weight-decay", "nan"], "--weight-decay: got nan, expected 0 or more"),
        (["--tracking.flush-s", "-1"], "--tracking.flush-s: got -1.0, expected 0 or more"),
        (["--eval-metrics", "nll,fad"], "--eval-metrics: got 'nll,fad'"),
        (["--ema-rates", "1.0"], "[0, 1)"),
        (["--ema-rates", "0.9", "0.9"], "rates that differ"),
        (["--sample-steps", "5000"], "--diffusion.timesteps"),
        (["--diffusion.loss", "l2"], "rescaled_kl"),
        (["--data.workers", "0"], "--data.workers: got 0, expected 1 or more"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--storage.endpoint-url", "http://user:hunter2@host"], "credentials"),
    ],
)
def test_mistakes_exit_2_before_anything_starts(flags: list[str], says: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_train(flags)
    said = capsys.readouterr()
    assert exit_.value.code == 2
    words = " ".join((said.out + said.err).replace("│", " ").split())
    assert says in words
    assert "hunter2" not in words


@pytest.mark.parametrize("content", ["- a list", "lr: [", "modle: {channels: 3}"])
def test_a_bad_yaml_file_exits_2(tmp_path, content: str, capsys) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit) as exit_:
        parse_train(["--config", str(file)])
    assert exit_.value.code == 2
    assert capsys.readouterr()


def test_horizon_in_any_unit() -> None:
    assert parse_horizon("2.5e18flops") == (2.5e18, "flops")
    for horizon, steps in (("7steps", 7), ("1000images", 8), ("10240flops", 8), ("10241flops", 9)):
        config, _ = parse_train(["--horizon", horizon, "--batch-size", "128"])
        assert horizon_steps(config, train_flops_per_image=10) == steps


def test_a_record_has_no_place_for_secrets() -> None:
    config = TrainConfig(
        storage=StorageConfig(endpoint_url="http://inside:9000", profile="mine"),
        tracking=TrackingConfig(uri="http://me:hunter2@mlflow"),
    )
    text = yaml.safe_dump(record(config))
    assert not any(word in text for word in ("hunter2", "inside", "mine", "endpoint"))


def test_a_run_is_continued_only_as_what_it_is() -> None:
    config, _ = parse_train([])
    longer, _ = parse_train(["--horizon", "9000steps", "--out", "elsewhere", "--log-every", "7", "--workers", "2"])
    check_same_run(record(config), longer)
    other, _ = parse_train(["--lr", "0.5", "--model.channels", "64"])
    with pytest.raises(ValueError, match=r"(?s)--lr: the run has 0.001, got 0.5.*--model.channels.*another --out"):
        check_same_run(record(config), other)


def test_unknown_fields_in_a_record_are_named() -> None:
    content = record(TrainConfig())
    content["model"]["wings"] = 2
    with pytest.raises(ValueError, match=r"model\.wings"):
        from_record(content)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("model.channels", 97, r"--model\.channels: got 97, expected a multiple of 32"),
        ("model.channels", "wide", r"--model\.channels: got 'wide', expected type int"),
        ("model", 3, "--model: got 3, expected type UNetConfig"),
        ("diffusion.timesteps", 0, r"--diffusion\.timesteps: got 0"),
        ("batch_size", None, "--batch-size: got None"),
        ("ema_rates", 0.9, r"--ema-rates: got 0\.9, expected a tuple"),
        ("horizon", "7", "--horizon: got '7'"),
    ],
)
def test_invalid_fields_in_a_record_are_named(name: str, value: object, says: str) -> None:
    content = record(TrainConfig())
    section, _, field = name.rpartition(".")
    (content[section] if section else content)[field] = value
    with pytest.raises(InputError, match=f"recorded config: {says}"):
        from_record(content)


def test_metrics_are_parsed_once_in_one_order() -> None:
    config = TrainConfig(eval_metrics=" fid, nll,fid,")
    assert config.metrics == ("nll", "fid")
    assert config.metrics is config.metrics
    assert record(config)["eval_metrics"] == " fid, nll,fid,"  # as typed


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, runpy; sys.argv = ['train', '--help']\n"
        "try: runpy.run_module('pipeline.train', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 's3fs', 'mpi4py', 'numpy') if m in sys.modules])"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip().endswith("[]"), result.stdout[-500:]
    assert time.perf_counter() - start < 30  # a hang, not a benchmark


def test_dry_run_tells_the_cost_and_stops(tmp_path) -> None:
    out = tmp_path / "run"
    said = run_train("--preset", "imagenet64", "--dry-run", "--out", str(out), "--horizon", "1e18flops").stdout
    for expected in (
        "121,063,942",
        "39.74 GMACs",
        "238.42 GFLOPs",
        "32,769 of 128 images",
        "GiB",
        "horizon: 1e18flops",
    ):
        assert expected in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("word", "meant"), [("--presets", "--preset"), ("--confg=x", "--config"), ("--dryrun", "--dry-run")]
)
def test_a_flag_that_is_almost_one_is_recognised(word: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_train([word, "digits"])
    assert capsys.readouterr().err == f"error: {word}: no such flag; did you mean {meant}?\n"


@pytest.mark.parametrize("out", ["preset", "config", "dry-run"])
def test_a_value_may_be_called_like_a_flag(out: str) -> None:
    config, dry_run = parse_train(["--out", out])
    assert (config.out, dry_run) == (out, False)
