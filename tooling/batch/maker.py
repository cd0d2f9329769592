"""A bundle, opened once where it can run, makes clip after clip; one that fails fails alone."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...calib_data.reader import Caption
from ...engines.base import BACKENDS, choose_backend
from ...engines.bundle import Bundle, bundles_folder
from ...engines.errors import UserError, last_line
from ...engines.home import home, locked
from ...runtime.pipeline import Pipeline
from .clips import Failed, Made, Plan, make_clips

if TYPE_CHECKING:
    from ...exporters.checkpoint import Checkpoint
    from ..recipe import Recipe


@dataclass(frozen=True)
class Job:
    """What a machine needs to know: the bundle's folder on the one that asks, its `content_of`, what to generate."""

    folder: str
    content: str
    plan: Plan

    @classmethod
    def of(cls, bundle: Bundle, plan: Plan) -> Job:
        """A plan without its captions, which come with each batch."""
        return cls(str(bundle.folder), content_of(bundle), Plan((), plan.settings, plan.seconds))


class ClipMaker:
    """An open bundle. Raises UserError when it is not here or cannot run here."""

    def __init__(self, bundle: Bundle, plan: Plan, threads: int | None = None):
        self._plan = plan
        self._pipeline = Pipeline(bundle, threads=threads)
        self.backend = bundle.backend

    @classmethod
    def of_job(cls, job: Job, threads: int | None = None) -> ClipMaker:
        """On another machine: the bundle, or where its backend cannot run the same recipe's for one that can."""
        return cls(runnable(bundle_here(Path(job.folder), job.content)), job.plan, threads)

    def make(self, clips: Sequence[tuple[Caption, int]]) -> Iterator[Made]:
        """A batch of captions and seeds, computed at once; where that fails, what is left of it one by one."""
        begun = 0
        try:
            for made in make_clips(self._pipeline, self._plan, clips):
                begun += 1
                yield made
        except Exception as error:
            if len(clips) > 1:
                for each in clips[begun:]:
                    yield from self.make([each])
                return
            yield failed(clips[0], reason(error))


def failed(clip: tuple[Caption, int], error: str) -> Failed:
    caption, seed = clip
    return Failed(caption.id, caption.text, seed, error)


def reason(error: BaseException) -> str:
    """One line, with the kind of an error that was not written for users."""
    text = last_line(error) if isinstance(error, Exception) else str(error)
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def content_of(bundle: Bundle) -> str:
    """A digest of its backend and files: copies of one bundle have the same."""
    files = {name: entry["sha256"] for name, entry in bundle.manifest["files"].items()}
    return hashlib.sha256(json.dumps([files, bundle.backend], sort_keys=True).encode()).hexdigest()


def bundle_here(folder: Path, content: str) -> Bundle:
    """A bundle that another machine has at `folder`: there, or of its name in the home folder. Every byte is checked.

    Raises UserError, naming this machine, when it is at neither place or differs.
    """
    places = [place for place in (folder, bundles_folder() / folder.name) if place.is_dir()]
    for place in places:
        if content_of(bundle := Bundle(place)) == content:
            return bundle.verify()
    what = f"another bundle at {places[0]}" if places else f"no bundle {folder.name}"
    raise UserError(
        f"{platform.node()} has {what}; copy {folder} to the same place or to bundles/ of its DIT_TRT_HOME, or keep it "
        "on a shared disk"
    )


def runnable(bundle: Bundle) -> Bundle:
    """The bundle, or where its backend cannot run one of the same recipe and model for a backend that can.

    That one is built when it is missing, which needs the model it was built from and the extra `build`, and kept. The
    same seed gives other bytes on another backend. Raises UserError, naming the fixes, when neither can be had.
    """
    if (why := BACKENDS[bundle.backend].unusable()) is None:
        return bundle
    try:
        return _rebuilt(bundle)
    except (UserError, ImportError) as error:
        raise UserError(
            f"{platform.node()}: the backend {bundle.backend} cannot run here ({why}), and the recipe was not built "
            f"for another ({reason(error)}); mend either, or build the bundle for a backend that all machines have"
        ) from None


def _rebuilt(bundle: Bundle) -> Bundle:
    from ..build import build_bundle
    from ..recipe import Recipe
    from ..workflow import checkpoint_of

    backend = choose_backend("auto")
    folder = home() / "rebuilt" / f"{content_of(bundle)[:16]}-{backend}"
    with locked(folder):
        try:
            return Bundle(folder).verify()
        except UserError:
            recipe, checkpoint = Recipe.from_dict(bundle.manifest["recipe"]), checkpoint_of(bundle)
            table = _same_table(bundle, checkpoint, recipe) if recipe.chosen(checkpoint.linears) else None
            return build_bundle(checkpoint, recipe, backend, folder, table).bundle


def _same_table(bundle: Bundle, checkpoint: Checkpoint, recipe: Recipe) -> Path:
    """The bundle's own calibration table, from the checkpoint or this machine's cache: nothing is calibrated here."""
    from ..tables import table_facts
    from ..workflow import CalibrationOptions, table_at_hand

    found = table_at_hand(checkpoint, CalibrationOptions(), recipe).path
    if found is None or table_facts(found)["sha256"] != bundle.manifest["calibration"]["sha256"]:
        raise UserError("its calibration table is not on this machine")
    return found
