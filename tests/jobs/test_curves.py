"""Learning curves from the journals of runs, and what is refused."""

from pathlib import Path

import pytest
from conftest import run_module
from PIL import Image

from jobs.curves import main


def test_the_curves_of_one_run_and_of_two(small_run: str, tmp_path: Path) -> None:
    for runs in ([small_run], [small_run, small_run]):
        out = tmp_path / f"{len(runs)}" / "curves.png"
        main([str(out), *runs])
        with Image.open(out) as picture:
            picture.verify()
            assert (picture.format, picture.size) == ("PNG", (768, 672))


def test_a_folder_without_a_journal_is_refused(tmp_path: Path, capsys) -> None:
    run, out = str(tmp_path / "empty"), tmp_path / "curves.png"
    with pytest.raises(SystemExit, match="1"):
        main([str(out), run])
    expected = f"error: {run}: no journal with metrics; expected the --out of a training run\n"
    assert capsys.readouterr().err == expected
    assert not out.exists()


def test_exchanged_arguments_are_explained(small_run: str, tmp_path: Path) -> None:
    out = tmp_path / "curves.png"
    result = run_module("jobs.curves", small_run, str(out), check=False)
    assert result.returncode == 1
    assert result.stderr == f"error: out: got {small_run}, expected a file name ending in .png\n"
    assert not out.exists()
