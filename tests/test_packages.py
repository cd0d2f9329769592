"""docs/packages.md, pyproject.toml and the imports in the tree agree: a row for each dependency, a use for each row."""

import ast
import re
import sys
import tomllib

import pytest
from readme import ROOT

PAGE = (ROOT / "docs" / "packages.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
IMPORT_NAMES = {  # where they differ by more than - and _
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "onnxruntime-gpu": "onnxruntime",
    "nvidia-modelopt": "modelopt",
    "tensorrt-rtx-cu13": "tensorrt_rtx",
}
# Needed by what they are installed for, or run as commands; their rows say where they are named, not where imported.
NOT_IMPORTED = {
    "onnxscript",
    "einops",
    "einops-exts",
    "pytest-xdist",
    "tqdm",
    "diffusers",
    "transformers",
    "requests",
    "httpx2",
    "ruff",
    "mypy",
    "build",
    "setuptools",
    # whichever of the two there is, and bindings that only a GPU needs
    "tensorrt",
    "tensorrt-rtx-cu13",
    "cuda-bindings",
}


def table(heading):
    section = PAGE.split(f"\n## {heading}")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert len(rows) > 2
    return rows[2:]


USED = {package: (where, needed_by) for package, _, _, where, needed_by in table("What we use")}


def declared():
    """package -> the extras that ask for it (`run` for none), as pyproject.toml says it."""
    lists = {
        "run": PROJECT["project"]["dependencies"],
        **PROJECT["project"]["optional-dependencies"],
        "build system": PROJECT["build-system"]["requires"],
    }
    found = {}
    for extra, requirements in lists.items():
        for requirement in requirements:
            name = re.match(r"[A-Za-z0-9_.-]+", requirement)[0]
            if name != "dit-trt":
                found.setdefault(name, set()).add(extra)
    return found


def imported():
    """Top-level module -> the files that import it, wherever in them, relative to the root."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if any(part.startswith(".") or part in ("build", "venv", "work") for part in name.split("/")):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for module in modules:
                found.setdefault(module.partition(".")[0], set()).add(name)
    return found


IMPORTED = imported()


def test_every_dependency_has_its_row_and_every_row_is_a_dependency():
    assert {package: {*needed_by.split(", ")} for package, (_, needed_by) in USED.items()} == declared()


@pytest.mark.parametrize("package", USED)
def test_a_row_says_where_its_package_is_used(package):
    places = re.findall(r"`([^`]+)`", USED[package][0])
    assert places
    for place in places:
        assert (ROOT / place).exists(), place
    if package in NOT_IMPORTED:
        for place in places:
            words = (ROOT / place).read_text("utf-8")
            assert package in words or package.replace("-", "_") in words, place
        return
    users = IMPORTED[IMPORT_NAMES.get(package, package.replace("-", "_"))]

    def within(user, place):
        return user == place or user.startswith(f"{place}/")

    for place in places:
        assert any(within(user, place) for user in users), f"nothing in {place} imports {package}"
    untold = {user for user in users if not any(within(user, place) for place in places)}
    assert {user for user in untold if not user.startswith(("tests/", "examples/"))} == set()


def test_nothing_is_imported_that_is_not_declared():
    names = {IMPORT_NAMES.get(package, package.replace("-", "_")) for package in USED}
    peers = {package.replace("-", "_") for package, *_ in table("Test peers only")}
    ours = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"dit_trt"}
    third_party = IMPORTED.keys() - sys.stdlib_module_names
    assert third_party - names - peers - ours == {"google"}  # protobuf, which comes with onnx


def test_peers_are_installed_as_the_page_says():
    from peers import INSTALL

    for package, *_ in table("Test peers only"):
        assert package not in declared()
        assert f"pip install --no-deps {package}==" in INSTALL[package.replace("-", "_")]


def test_what_is_not_used_is_not():
    for packages, *_ in table("Not used"):
        for package in packages.split(", "):
            assert package not in declared()
            assert package.replace("-", "_") not in IMPORTED
