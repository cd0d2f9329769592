"""Fixtures of the bundle tests."""

import pytest
from bundles import make


@pytest.fixture
def bundle(tmp_path):
    return make(tmp_path / "bundles" / "one")


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
