"""The demo, with fewer steps and images: all of its commands work together."""

import re
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from jobs.demo import demo

SIZES = {"grid.png": (530, 530), "curves.png": (768, 672)}  # 8 x 8 tiles of 64 pixels and the lines between


@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    demo(steps=(24,), images=2)
    output = capfd.readouterr().out
    assert "finished at step 24" in output
    assert len(re.findall(r"^bits/dim +\d\.\d{4} \+- 0\.\d{4} ", output, re.MULTILINE)) == 2
    drawn = [Path(path) for path in re.findall(r"\s(/\S+\.png)", output)]
    assert {path: path.exists() for path in drawn} == {tmp_path / "runs" / "demo" / name: True for name in SIZES}
    for path in drawn:
        with Image.open(path) as picture:
            picture.verify()
            assert (picture.format, picture.size) == ("PNG", SIZES[path.name])


def test_a_failing_command_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "data").write_text("a file where the dataset's folder should be")
    with pytest.raises(SystemExit) as ended:
        demo(steps=(24,), images=2)
    assert ended.value.code == 1
