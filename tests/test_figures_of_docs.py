"""The figures of the docs: they are there, small, and every one is shown."""

import re

import PIL.Image
import pytest
from readme import README, ROOT

PAGES = [(ROOT / "docs" / f"{page}.md").read_text("utf-8") for page in ("activations", "performance")]
FIGURES = sorted((ROOT / "docs" / "figures").iterdir())


def test_every_figure_is_shown_and_every_one_shown_is_there():
    shown = [re.findall(r"!\[[^\]]+\]\(figures/([^)]+)\)", page) for page in PAGES]
    assert sorted(name for names in shown for name in names) == [path.name for path in FIGURES]
    assert [len(names) for names in shown] == [6, 4]


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.name)
def test_a_figure_is_small_and_sharp(path):
    assert path.stat().st_size < 150_000
    with PIL.Image.open(path) as picture:
        picture.load()
        assert (picture.format, picture.width) == ("PNG", 1152)


def test_pictures_of_the_readme_are_there():
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README.read_text("utf-8"))
    assert shown
    assert all((ROOT / path).is_file() for path in shown)
