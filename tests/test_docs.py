"""The commands in the documents: every program exists and knows every flag, and every linked file exists."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, run_module

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SUBCOMMANDS = {"pipeline.prepare", "pipeline.convert", "jobs.study"}


def commands(document: Path) -> list[list[str]]:
    """Yield the words from `-m MODULE` on, for each of our programs in the document's shell blocks."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", document.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            ours = [i for i, word in enumerate(words) if re.fullmatch(r"(pipeline|jobs)\.\w+", word)]
            found += [words[i:] for i in ours if i and words[i - 1] == "-m"]
    return found


@cache
def known(module: str, subcommand: str) -> set[str]:
    said = run_module(module, *([subcommand] if subcommand else []), "--help").stdout
    return set(re.findall(r"--[\w.-]+", said))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_real(document: Path) -> None:
    for module, *words in commands(document):
        subcommand = next((w for w in words if w.isalnum()), "") if module in SUBCOMMANDS else ""
        flags = {word.split("=")[0] for word in words if word.startswith("--")}
        flags -= {"--preset", "--dry-run", "--config", "--verify", "--help"}  # handled before the parser
        missing = {flag for flag in flags if flag.replace("--no-", "--") not in known(module, subcommand)}
        assert not missing, f"{module} {subcommand} knows no {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_there_are_commands() -> None:
    assert len(commands(ROOT / "README.md")) > 15
