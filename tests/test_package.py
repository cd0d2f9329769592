"""The package as a whole: what imports what, what needs what, and what a wheel holds."""

import ast
import fnmatch
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from processes import python

import dit_trt
from dit_trt.tooling.build import Built
from dit_trt.tooling.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
NOT_SHIPPED = {"tests", "docs", "examples", "build", "dist", "work", "venv"}
BUILD_EXTRA = ("torch", "onnx", "onnxscript", "ml_dtypes", "polygraphy")
HEAVY = ("torch", "onnx", "onnxruntime", "openvino", "numpy", "polygraphy", "transformers", "soundfile", "rich")


def package_folders():
    """Every folder of the repository that holds modules of the package, relative to the root."""
    tops = [
        path
        for path in ROOT.iterdir()
        if path.is_dir() and path.name not in NOT_SHIPPED and not path.name.startswith(".")
    ]
    return {Path(), *(module.parent.relative_to(ROOT) for top in tops for module in top.rglob("*.py"))}


def modules():
    """Every module of the package -> its dotted name without the first `dit_trt`."""
    found = {}
    for folder in package_folders():
        for path in (ROOT / folder).glob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[path] = parts[:-1] if parts[-1] == "__init__" else parts
    return found


# -------------------- what imports what


def loaded_by(code, without=()):
    finished = python(code + "\nimport json, sys; print(json.dumps(sorted(sys.modules)))", without=without)
    assert finished.returncode == 0, finished.stderr
    return {name.partition(".")[0] for name in json.loads(finished.stdout.splitlines()[-1])}


def test_importing_the_package_costs_nothing():
    names = loaded_by("import dit_trt; assert dit_trt.__version__")
    assert names.isdisjoint(HEAVY), names & set(HEAVY)
    assert "click" not in names


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_the_commands_help_is_instant(arguments):
    code = f"""
import sys
sys.argv[1:] = {arguments!r}
from dit_trt.tooling.cli import main
try:
    main()
except SystemExit as finished:
    assert finished.code == 0
"""
    names = loaded_by(code)
    assert names.isdisjoint(HEAVY), names & set(HEAVY)


def test_a_commands_help_needs_no_build_extra():
    for command in COMMANDS:
        code = f"from dit_trt.tooling.cli import main; main(['{command}', '--help'], standalone_mode=False)"
        names = loaded_by(code)
        assert names.isdisjoint({*BUILD_EXTRA, "openvino", "onnxruntime"}), names


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["inspect", "{bundle}", "--layers"], ["inspect", "{bundle}", "--recipe"], ["completion", "bash"]],
    ids=" ".join,
)
def test_looking_at_bundles_needs_no_engine_and_no_build_extra(tiny_sqs, arguments):
    arguments = [argument.format(bundle=tiny_sqs.folder) for argument in arguments]
    code = f"from dit_trt.tooling.cli import main; main({arguments!r}, standalone_mode=False)"
    names = loaded_by(code, without=(*BUILD_EXTRA, "openvino"))
    assert names.isdisjoint({*BUILD_EXTRA, "openvino", "transformers"}), names


def imports_of(path, package):
    """The dotted names inside dit_trt that a module imports, wherever in it; `if TYPE_CHECKING` counts too."""
    here = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [*here[: len(here) - node.level + 1], *base]
            elif base[0] == "dit_trt":
                base = base[1:]
            else:
                continue
            yield from ([*base, alias.name] for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1:] for alias in node.names if alias.name.split(".")[0] == "dit_trt")


MAY_IMPORT = {  # DESIGN section 2: tooling -> {exporters, runtime} -> engines
    "engines": {"engines"},
    "runtime": {"runtime", "engines"},
    "exporters": {"exporters", "engines"},
    "calib_data": {"calib_data", "engines"},
    "models": {"models"},
    "tooling": {"tooling", "exporters", "runtime", "engines", "calib_data", "models"},
}


@pytest.mark.parametrize("top", MAY_IMPORT)
def test_imports_point_one_way(top):
    edges = {
        (str(path.relative_to(ROOT)), target[0])
        for path, package in modules().items()
        if package[:1] == (top,)
        for target in imports_of(path, package)
    }
    assert {edge for edge in edges if edge[1] not in MAY_IMPORT[top]} == set()
    if top in ("runtime", "exporters", "tooling"):
        assert "engines" in {target for _, target in edges}  # the reader of imports reads


def test_every_package_has_its_direction():
    assert {package[0] for package in modules().values() if package} == {*MAY_IMPORT}


# -------------------- what needs what


def test_engines_and_runtime_import_without_the_build_extra():
    names = [".".join(package) for package in modules().values() if package[:1] in (("engines",), ("runtime",))]
    assert {"engines.openvino", "engines.onnxruntime", "runtime.pipeline"} <= set(names)
    code = "\n".join(f"import dit_trt.{name}" for name in sorted(names))
    assert loaded_by(code, without=BUILD_EXTRA).isdisjoint(BUILD_EXTRA)


def test_a_prompt_becomes_sound_without_the_build_extra(tiny_sqs, tmp_path):
    code = f"""
import dit_trt, numpy
audio, rate = dit_trt.Pipeline.open({str(tiny_sqs.folder)!r})("dog barking", seconds=0.5, steps=3)
numpy.save({str(tmp_path / "audio.npy")!r}, audio)
assert rate == 8000
"""
    assert loaded_by(code, without=BUILD_EXTRA).isdisjoint(BUILD_EXTRA)
    audio = np.load(tmp_path / "audio.npy")
    assert audio.shape == (2, 4000)
    assert np.abs(audio).max() == 1
    expected, _ = dit_trt.Pipeline.open(tiny_sqs.folder)("dog barking", seconds=0.5, steps=3)
    np.testing.assert_array_equal(audio, expected)


def test_openvino_tells_nobody_that_it_is_used():
    code = "import dit_trt.engines.openvino, openvino.tools.ovc as ovc; print(type(ovc.telemetry).__module__)"
    assert python(code).stdout == "openvino.tools.ovc.telemetry_stub\n"


def test_the_lazy_names_are_there():
    from dit_trt.engines.errors import UserError
    from dit_trt.runtime.pipeline import Pipeline, Settings
    from dit_trt.runtime.wav import write_wav
    from dit_trt.tooling.diff import compare
    from dit_trt.tooling.recipe import Recipe
    from dit_trt.tooling.workflow import CalibrationOptions, build

    expected = (CalibrationOptions, Pipeline, Recipe, Settings, UserError, build, compare, write_wav)
    assert {name: getattr(dit_trt, name) for name in dit_trt.__all__} == {value.__name__: value for value in expected}
    with pytest.raises(AttributeError, match="nonsense"):
        _ = dit_trt.nonsense


def test_a_missing_extra_is_named_where_python_needs_it():
    code = "import dit_trt; dit_trt.Pipeline, dit_trt.Settings, dit_trt.UserError, dit_trt.write_wav; dit_trt.build"
    last_line = python(code, without=BUILD_EXTRA).stderr.splitlines()[-1]
    assert re.fullmatch(r"ModuleNotFoundError: dit_trt.build needs \w+; .* -e '\.\[build\]' .*", last_line)


def test_what_build_returns_is_a_path(tiny_sqs):
    built = Built(tiny_sqs, 14, 14)
    assert Path(built) == tiny_sqs.folder
    assert str(built) == str(tiny_sqs.folder)
    assert dit_trt.Pipeline.open(built).bundle.folder == tiny_sqs.folder


# -------------------- what a wheel holds


def test_every_folder_with_modules_is_a_listed_package():
    expected = {".".join(("dit_trt", *folder.parts)) for folder in package_folders()}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(expected)
    assert len(listed) == len(set(listed))
    for folder in package_folders():
        assert (ROOT / folder / "__init__.py").is_file(), folder


def test_every_data_file_is_packaged():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    checked = []
    for package in ("models", "calib_data", "tooling/listening", "tooling/studio"):
        for path in (ROOT / package).rglob("*"):
            if path.is_dir() or path.suffix == ".py" or "__pycache__" in path.parts:
                continue
            name = path.relative_to(ROOT / package).as_posix()
            matching = [
                pattern
                for pattern in patterns["dit_trt." + package.replace("/", ".")]
                if fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
            ]
            assert matching, f"{package}/{name} would be missing from a wheel"
            checked.append(name)
    assert {"demo/model_config.json", "demo/model.safetensors", "demo/tokenizer.json"} <= set(checked)
    assert {"prompts.txt", "survey.html", "survey.css", "survey.js", "studio.css", "studio.js"} <= set(checked)
    assert (ROOT / "py.typed").is_file()
    assert "py.typed" in patterns["dit_trt"]


def test_licence_files_are_there():
    for name in PROJECT["project"]["license-files"]:
        assert (ROOT / name).stat().st_size > 0
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")


def test_the_version_is_one():
    assert dit_trt.__version__ == PROJECT["project"]["version"]


def test_this_is_the_package_under_test():
    assert dit_trt.__file__ is not None
    assert Path(dit_trt.__file__).resolve() == ROOT / "__init__.py"
