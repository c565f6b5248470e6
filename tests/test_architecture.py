"""The rules of the house that a program can check: imports go one way, in no circle.

Needs only the standard library.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("iddpm", "pipeline", "jobs")  # each may import those before it, and itself


def imports_of(root: Path) -> dict[str, set[str]]:
    """Map each module below `root` to the modules there that it imports, anywhere in it."""
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
    }
    graph = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                parent = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*parent, *([node.module] if node.module else [])])
                names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        graph[module] = (names & files.keys()) - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules that import themselves by way of others."""

    def reachable(module: str) -> set[str]:
        seen: set[str] = set()
        todo = [module]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    return [module for module in graph if module in reachable(module)]


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles(imports_of(ROOT)) == []


@pytest.mark.parametrize("how", ["import pipeline.b", "from pipeline import b", "from . import b", "from .b import y"])
def test_a_planted_circle_is_found(how: str, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "a.py").write_text(f"def late():\n    {how}\n")
    (tmp_path / "pipeline" / "b.py").write_text("from pipeline import a\n")
    (tmp_path / "pipeline" / "c.py").write_text("import pipeline.a\n")
    assert circles(imports_of(tmp_path)) == ["pipeline.a", "pipeline.b"]


def test_packages_import_only_those_below_them() -> None:
    for module, names in imports_of(ROOT).items():
        allowed = PACKAGES[: PACKAGES.index(module.split(".")[0]) + 1]
        above = [name for name in names if name.split(".")[0] not in allowed]
        assert not above, f"{module} imports {', '.join(above)}"


PROGRAMS = {f"pipeline.{name}" for name in ("train", "sample", "evaluate", "prepare", "convert", "tracking")}
LIBRARIES = tuple(f"pipeline.{name}." for name in ("storage", "data", "distributed", "run", "evaluation"))


def test_libraries_import_no_program() -> None:
    for module, names in imports_of(ROOT).items():
        if module.startswith(("iddpm", *LIBRARIES)):
            assert not names & PROGRAMS, f"{module} imports {', '.join(names & PROGRAMS)}"


def test_the_map_in_the_readme_names_every_module_once() -> None:
    lines = (ROOT / "README.md").read_text().split("```\niddpm/config.py")[1].split("```")[0]
    named = [line.split()[0] for line in f"iddpm/config.py{lines}".splitlines() if line]
    files = [path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert sorted(named) == sorted(file for file in files if not file.endswith("__init__.py"))
