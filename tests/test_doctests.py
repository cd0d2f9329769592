"""The examples in docstrings, run as they stand where a newcomer stands: the demo is built, the folder is empty."""

import doctest
from importlib import import_module

import pytest
from readme import ROOT

FOLDERS = ("calib_data", "engines", "exporters", "runtime", "tooling")
FILES = [ROOT / "__init__.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
WITH_EXAMPLES = [path for path in FILES if ">>> " in path.read_text("utf-8")]


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("dit_trt", *parts)).removesuffix(".__init__")


def test_what_an_app_developer_starts_with_has_examples():
    assert {"dit_trt", "dit_trt.runtime.pipeline", "dit_trt.tooling.workflow"} <= set(map(name_of, WITH_EXAMPLES))


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=name_of)
def test_examples_in_docstrings(path, newcomer):
    assert "SKIP" not in path.read_text("utf-8")
    module = import_module(name_of(path))
    # Names come from the examples' own imports, as in a fresh session.
    tests = [test for test in doctest.DocTestFinder().find(module, globs={}) if test.examples]
    assert sum(len(test.examples) for test in tests) == path.read_text("utf-8").count(">>> ")
    runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    report = []
    for test in tests:
        runner.run(test, out=report.append)
    assert report == [], "".join(report)
    assert runner.tries > 0
