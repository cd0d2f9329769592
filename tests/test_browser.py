"""Chromium missing: a failure in CI that says how to get it, which `.ci/run` has tried."""

import browser
import pytest
from readme import ROOT


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), (None, pytest.skip.Exception)])
def test_a_missing_browser_fails_in_ci_and_skips_at_home(monkeypatch, ci, outcome):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CI", raising=False)
    if ci:
        monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match=browser.INSTALL):
        browser.require()


def test_ci_and_the_pages_install_it_so():
    for name in (".ci/run", "CONTRIBUTING.md"):
        assert browser.INSTALL in (ROOT / name).read_text("utf-8")
