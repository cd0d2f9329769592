"""The bundle on disk: whole or absent, checked when opened, found by folder, by name or by age."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from manifests import stamped

from dit_trt.engines.bundle import (
    FORMAT,
    MANIFEST,
    REQUIRED,
    Bundle,
    bundles_folder,
    find_bundle,
    home,
    list_bundles,
    new_bundle,
    unusable_bundles,
    write_manifest,
)
from dit_trt.engines.errors import UserError

FILES = {name: name.encode() for name in sorted(REQUIRED)} | {"step.onnx.data": bytes(range(256)) * 40}
SIZES = (
    *("io_channels", "embed_dim", "depth", "num_heads", "dim_heads", "cond_dim"),
    *("prompt_tokens", "context_tokens", "max_latents", "downsampling_ratio", "sample_rate"),
)
LAYER = {
    **{"name": "transformer.layers.0.ff.ff.2", "kind": "ff.ff.2", "graph": "step", "bits": "w8a8"},
    **{"in_features": 32, "out_features": 16, "float_bytes": 2048, "bytes": 592},
}


def manifest(created="2026-01-01T00:00:00+00:00", method="sqs"):
    pretransform = {"type": "mel_pca", "config": {"n_fft": 256, "hop_length": 64, "griffin_lim_iterations": 4}}
    return {
        "backend": "openvino",
        "created": created,
        "model": {"name": "tiny", "source": "/x", "digest": "0" * 64, "licence": "", "pretransform": pretransform},
        "recipe": {"method": method, "bits": "w8a8"},
        "linears": 1,
        "int8_linears": 1,
        "layers": [{**LAYER, "int8": True}],
        "schedule": {"steps": 100, "sampler": "euler", "cfg": 7.0, "seed": 1, "sigma_min": 0.3, "sigma_max": 500},
        "sizes": dict.fromkeys(SIZES, 7),
    }


def fill(work, files=FILES, **options):
    for name, content in files.items():
        (work / name).write_bytes(content)
    write_manifest(work, manifest(**options))


def make(folder, files=FILES, **options):
    with new_bundle(folder) as work:
        fill(work, files, **options)
    return folder


def tree(folder):
    """Every file and folder under `folder`, hidden ones too, with what the files hold."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refusal(call, *args):
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(folder, change):
    """Apply `change` to the manifest of `folder`, in place, as a forger does: its own hash is right again."""
    values = json.loads((folder / MANIFEST).read_text("utf-8"))
    change(values)
    (folder / MANIFEST).write_text(stamped(values), "utf-8")


@pytest.fixture
def bundle(tmp_path):
    return make(tmp_path / "bundles" / "one")


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# -------------------- writing


def test_a_finished_bundle_holds_what_was_written(bundle):
    opened = Bundle(bundle).verify()
    assert {name: opened.path(name).read_bytes() for name in opened.manifest["files"]} == FILES
    assert opened.size_bytes == sum(map(len, FILES.values()))
    assert opened.backend == "openvino"
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["one"]
    assert sorted(path.name for path in bundle.iterdir()) == sorted([*FILES, MANIFEST])
    assert bundle.stat().st_mode & 0o777 == 0o755


class Sudden(BaseException):
    """As KeyboardInterrupt and SystemExit, not an Exception."""


@pytest.mark.parametrize("error", [ValueError, UserError, OSError, KeyboardInterrupt, Sudden])
@pytest.mark.parametrize("old", [False, True])
def test_an_interrupted_write_leaves_everything_as_it_was(tmp_path, error, old):
    target = tmp_path / "bundles" / "one"
    target.parent.mkdir()
    if old:
        make(target)
    before = tree(tmp_path)
    with pytest.raises(error), new_bundle(target) as work:
        fill(work, {**FILES, "step.onnx": b"half of"})
        assert tree(tmp_path) != before
        raise error
    assert tree(tmp_path) == before


def test_a_bundle_without_a_manifest_is_not_finished(tmp_path):
    with pytest.raises(AssertionError), new_bundle(tmp_path / "one") as work:
        (work / "step.onnx").write_bytes(b"a graph")
    assert tree(tmp_path) == {}


def test_a_bundle_that_could_not_be_opened_never_takes_the_place(bundle):
    before = tree(bundle.parent)
    with pytest.raises(UserError, match=r"does not list step\.onnx"), new_bundle(bundle) as work:
        fill(work, {name: content for name, content in FILES.items() if name != "step.onnx"})
    assert tree(bundle.parent) == before


def test_a_link_to_a_bundle_stays_one(bundle, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(bundle)
    make(link, created="2027-01-01T00:00:00+00:00")
    assert link.is_symlink() and Bundle(bundle).verify().manifest["created"].startswith("2027")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundles", "link"]
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_the_work_of_a_living_build_is_never_swept(bundle):
    with new_bundle(bundle) as first:
        fill(first)
        make(bundle, created="2027-01-01T00:00:00+00:00")
        assert (first / MANIFEST).is_file()
    assert Bundle(bundle).verify().manifest["created"].startswith("2026")
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_in_the_home_folder_any_build_sweeps_what_others_left(own_home):
    left = bundles_folder() / ".gone.123-abc_d"
    left.mkdir(parents=True)
    make(bundles_folder() / "one")
    assert [path.name for path in bundles_folder().iterdir()] == ["one"]


def test_elsewhere_only_the_leftovers_of_this_bundle_are_swept(tmp_path):
    for name in (".one.123-abc", ".two.123-abc", ".one.notes", ".onesie-1"):
        (tmp_path / name).mkdir()
    make(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".one.notes", ".onesie-1", ".two.123-abc", "one"]


def test_a_new_bundle_replaces_an_old_one_whole(bundle):
    make(bundle, {**FILES, "other.txt": b"newer"}, created="2027-01-01T00:00:00+00:00")
    assert sorted(path.name for path in bundle.iterdir()) == sorted([*FILES, "other.txt", MANIFEST])
    assert Bundle(bundle).verify().manifest["created"].startswith("2027")
    assert [path.name for path in bundle.parent.iterdir()] == ["one"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_a_failure_while_taking_its_place_keeps_the_old_bundle(bundle, monkeypatch, error):
    before = tree(bundle.parent)
    rename = Path.rename

    def fail_at_the_end(self, target):
        if target == bundle and not self.name.endswith(".old"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_end)
    monkeypatch.setattr("dit_trt.engines.bundle._exchange", lambda one, other: False)  # a system that cannot swap
    with pytest.raises(type(error)):
        make(bundle, {**FILES, "other.txt": b"newer"})
    assert tree(bundle.parent) == before


def test_a_reader_always_finds_a_bundle_while_it_is_replaced(bundle):
    """Two folders are swapped in one step: no look ever finds neither."""
    done = threading.Event()

    def replace():
        for i in range(60):
            make(bundle, {**FILES, "other.txt": str(i).encode()})
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    looks = 0
    while not done.is_set():
        assert (bundle / MANIFEST).is_file()
        looks += 1
    writer.join()
    assert looks > 60 and Bundle(bundle).verify().path("other.txt").read_bytes() == b"59"


def test_a_bundle_set_aside_by_a_killed_build_comes_back(bundle):
    bundle.rename(bundle.parent / f".{bundle.name}.999999999-x.old")
    with pytest.raises(ZeroDivisionError), new_bundle(bundle):
        raise ZeroDivisionError
    assert Bundle(bundle).verify()
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


@pytest.mark.parametrize("content", [{}, {"thesis.txt": b"years of work"}], ids=["empty folder", "folder"])
def test_a_folder_that_is_no_bundle_is_refused_and_never_touched(tmp_path, content):
    target = tmp_path / "mine"
    target.mkdir()
    for name, value in content.items():
        (target / name).write_bytes(value)
    before = tree(tmp_path)
    assert "--output" in refusal(make, target)
    assert tree(tmp_path) == before


def test_a_file_at_the_target_is_refused_and_never_touched(tmp_path):
    (tmp_path / "mine").write_bytes(b"years of work")
    assert "--output" in refusal(make, tmp_path / "mine")
    assert tree(tmp_path) == {"mine": b"years of work"}


def test_parents_are_made(tmp_path):
    assert Bundle(make(tmp_path / "a" / "b" / "one")).verify()


KILLED = """
import sys, time
from test_bundle import fill
from dit_trt.engines.bundle import bundles_folder, new_bundle
with new_bundle(bundles_folder() / "one") as work:
    fill(work)
    print("written", flush=True)
    time.sleep(600)
"""


def test_a_killed_write_leaves_no_bundle_and_does_not_stand_in_the_way(own_home):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *filter(None, sys.path)))}
    child = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, env=environment)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"written\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    [left] = bundles_folder().iterdir()  # all was written but the last rename
    assert Bundle(left).verify()
    assert list_bundles() == []
    assert "dit-trt build" in refusal(find_bundle, None)
    make(bundles_folder() / "one")
    assert [found.folder.name for found in list_bundles()] == ["one"]


# -------------------- opening


@pytest.mark.parametrize("folder", ["nothing", "folder", "file"])
def test_what_is_no_bundle_names_the_command_that_makes_one(tmp_path, folder):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    message = refusal(Bundle, tmp_path / folder)
    assert str(tmp_path / folder) in message
    assert "dit-trt build" in message


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe{}"], ids=["cut", "empty", "not UTF-8"])
def test_an_unreadable_manifest_is_named(bundle, text):
    (bundle / MANIFEST).write_bytes(text)
    message = refusal(Bundle, bundle)
    assert str(bundle / MANIFEST) in message
    assert "build the bundle again" in message


@pytest.mark.parametrize(
    "text", ["[]", "3", "{}", '{"format": 1}', '{"format": 3}', '{"format": "2"}', '{"format": 2.0}']
)
def test_another_format_is_refused(bundle, text):
    (bundle / MANIFEST).write_text(text)
    assert "has bundle format" in refusal(Bundle, bundle)


@pytest.mark.parametrize("key", ["backend", "created", "files", "model", "recipe", "schedule", "sizes"])
@pytest.mark.parametrize("value", [None, 7, [], "\n"])
def test_a_missing_or_misstated_field_is_named(bundle, key, value):
    edit(bundle, lambda values: values.pop(key) if value is None else values.update({key: value}))
    message = refusal(Bundle, bundle)
    assert f"lacks or misstates {key}" in message
    assert message.endswith("build the bundle again")


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        *((f"sizes.{name}", value) for name in SIZES for value in (0, -1, 1.0, True, "7", None, 2**31)),
        *(("linears", value) for value in (None, [], "7", 1.0, -1)),
        *(("layers", value) for value in (None, {}, [7], [{}], [{**LAYER, "bits": 8}], [{**LAYER, "bytes": "7"}])),
        *((f"recipe.{name}", value) for name in ("method", "bits") for value in (None, 3, [], "")),
        *((f"model.{name}", value) for name in ("name", "source", "digest", "licence") for value in (None, 3, [])),
        *(
            (f"schedule.{name}", value)
            for name in ("steps", "sampler", "cfg", "seed", "sigma_min")
            for value in (None, [])
        ),
        ("model.digest", "0" * 63),
        ("model.pretransform", None),
        ("model.pretransform.config", []),
        *((f"model.pretransform.config.{name}", bad) for name in ("n_fft", "hop_length") for bad in (None, 0, "7")),
        ("model.pretransform.type", 3),
        ("schedule.seed", -1),
        ("files.step.onnx", 7),
    ],
)
def test_a_field_of_another_type_is_named(bundle, key, bad):
    part, _, name = key.partition(".")

    def change(values):
        *path, last = [part, name] if part == "files" else key.split(".")
        for step in path:
            values = values[step]
        values[last] = bad

    edit(bundle, change)
    expected = "files" if part == "files" else "model.pretransform" if "pretransform" in key else key
    assert f"lacks or misstates {expected}" in refusal(Bundle, bundle)


def test_fields_of_later_versions_are_no_fault(bundle):
    edit(bundle, lambda values: values.update(later={"x": [1]}, versions=None))
    assert Bundle(bundle).verify()


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_what_is_not_json_is_refused(bundle, value):
    text = (bundle / MANIFEST).read_text().replace('"cfg": 7.0', f'"cfg": {value}')
    (bundle / MANIFEST).write_text(text)
    assert f"{value} is not JSON" in refusal(Bundle, bundle)


def test_a_bottomless_manifest_is_refused(bundle):
    (bundle / MANIFEST).write_text("[" * 200_000)
    assert "cannot be read" in refusal(Bundle, bundle)


def test_every_changed_byte_of_the_manifest_is_noticed(bundle):
    good = (bundle / MANIFEST).read_bytes()
    rng = random.Random(1)
    positions = [0, len(good) - 1, *(rng.randrange(len(good)) for _ in range(300))]
    for position in positions:
        bad = bytearray(good)
        bad[position] ^= 1 << rng.randrange(8)
        (bundle / MANIFEST).write_bytes(bad)
        assert MANIFEST in (message := refusal(Bundle, bundle)) or "has bundle format" in message
    for bad in (good[:-1], good + b"\n", b" " + good, good.replace(b"\n", b""), good.replace(b"tiny", b"tinY")):
        (bundle / MANIFEST).write_bytes(bad)
        assert "does not match its own sha256" in refusal(Bundle, bundle)
    (bundle / MANIFEST).write_bytes(good)
    assert Bundle(bundle).verify()


def test_a_manifest_written_again_is_whole(bundle):
    before = Bundle(bundle).manifest
    write_manifest(bundle, before)
    after = Bundle(bundle).verify().manifest
    assert after == before and after["format"] == FORMAT
    assert (bundle / MANIFEST).read_text() == (bundle / MANIFEST).read_text().strip() + "\n"


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_a_file_that_is_not_listed_is_noticed(bundle, name):
    edit(bundle, lambda values: values["files"].pop(name))
    assert f"does not list {name}" in refusal(Bundle, bundle)


def test_an_emptied_file_table_is_refused(bundle):
    edit(bundle, lambda values: values.update(files={}))
    assert "does not list conditioning.onnx, " in refusal(Bundle, bundle)


def test_a_further_graph_comes_with_its_data(tmp_path):
    more = {"encoder.onnx": b"a graph", "encoder.onnx.data": b"weights"}
    folder = make(tmp_path / "one", {**FILES, **more})
    assert Bundle(folder).verify().manifest["files"].keys() == FILES.keys() | more.keys()
    edit(folder, lambda values: values["files"].pop("encoder.onnx.data"))
    assert "does not list encoder.onnx.data" in refusal(Bundle, folder)


@pytest.mark.parametrize(
    "files",
    [["step.onnx"], {"step.onnx": 7}, {"step.onnx": {"bytes": 7}}, {"step.onnx": {"sha256": "0" * 64}}]
    + [{"step.onnx": {"bytes": bad, "sha256": "0" * 64}} for bad in (-1, 1.5, True, "7", None)]
    + [{"step.onnx": {"bytes": 7, "sha256": bad}} for bad in ("", "0" * 63, "G" * 64, 7, None)],
)
def test_a_file_table_of_another_shape_is_refused(bundle, files):
    edit(bundle, lambda values: values.update(files=files))
    message = refusal(Bundle, bundle)
    assert str(bundle / MANIFEST) in message
    assert "misstates files; build the bundle again" in message


@pytest.mark.parametrize("kind", ["link", "folder", "dangling link"])
def test_what_is_no_plain_file_is_refused(bundle, kind):
    file = bundle / "step.onnx"
    elsewhere = bundle.parent / "elsewhere"
    if kind == "link":
        elsewhere.write_bytes(file.read_bytes())
    file.unlink()
    if kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(elsewhere)
    assert "step.onnx is not a plain file" in refusal(Bundle, bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle, name):
    (bundle / name).unlink()
    assert f"lacks {name}" in refusal(Bundle, bundle)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_size_is_named(bundle, name, change):
    (bundle / name).write_bytes(FILES[name][:change] if change < 0 else FILES[name] + b"\0")
    assert f"{name} has the wrong size" in refusal(Bundle, bundle)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("position", [0, -1])
def test_one_changed_bit_is_found_and_its_file_named(bundle, name, position):
    content = bytearray(FILES[name])
    content[position] ^= 1
    (bundle / name).write_bytes(content)
    assert f"{name} does not match its sha256" in refusal(Bundle(bundle).verify)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "inner/step.onnx", "", ".", "..", "a\\b", "a\nb", "x" * 300]
)
def test_a_file_outside_the_folder_is_refused(bundle, name):
    secret = bundle.parent / "secret"
    secret.write_bytes(b"1")
    edit(bundle, lambda values: values["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
    assert f"names a file outside itself: {name!r:.60}" in refusal(Bundle, bundle)


# -------------------- finding


def three():
    """Three bundles, the newest neither first nor last by name, the newest of all a float one."""
    make(bundles_folder() / "b", created="2026-03-01T00:00:00+00:00")
    make(bundles_folder() / "a", created="2026-01-01T00:00:00+00:00")
    make(bundles_folder() / "c", created="2026-02-01T00:00:00+00:00")
    make(bundles_folder() / "float", created="2026-04-01T00:00:00+00:00", method="none")


def test_bundles_are_listed_newest_first(own_home):
    assert list_bundles() == []
    three()
    assert [found.folder.name for found in list_bundles()] == ["float", "b", "c", "a"]


def test_a_damaged_bundle_is_not_listed(own_home):
    three()
    (bundles_folder() / "b" / "step.onnx").unlink()
    (bundles_folder() / "notes.txt").write_text("not a folder")
    assert [found.folder.name for found in list_bundles()] == ["float", "c", "a"]


def test_a_damaged_newest_bundle_is_not_passed_over_in_silence(own_home):
    three()
    step = bundles_folder() / "float" / "step.onnx"
    step.write_bytes(b"x")
    message = refusal(find_bundle, None)
    assert message.startswith("the newest bundle cannot be used: the bundle float is damaged: step.onnx ")
    assert message.endswith("build it again, or choose one with --bundle, as b")
    assert find_bundle(None, quantized=True).folder.name == "b"
    assert list(unusable_bundles()) == [bundles_folder() / "float"]
    (bundles_folder() / "b" / MANIFEST).write_bytes(b"")
    assert "the newest bundle cannot be used" in refusal(find_bundle, None, True)
    assert list(unusable_bundles()) == [bundles_folder() / "b", bundles_folder() / "float"]


def test_a_damaged_older_bundle_does_not_stand_in_the_way(own_home):
    three()
    (bundles_folder() / "c" / "step.onnx").unlink()
    assert find_bundle(None, quantized=True).folder.name == "b"


def test_bundles_of_an_older_format_are_not_called_none(own_home):
    three()
    for folder in bundles_folder().iterdir():
        edit(folder, lambda values: values.update(format=1))
    assert f"has bundle format 1, this version reads {FORMAT}; build it again" in refusal(find_bundle, None)


def test_without_a_name_the_newest_is_found(own_home):
    three()
    assert find_bundle(None).folder.name == "float"
    assert find_bundle(None, quantized=True).folder.name == "b"


def test_a_bundle_is_found_by_name_and_by_folder(own_home, tmp_path):
    three()
    assert find_bundle("c").folder == bundles_folder() / "c"
    elsewhere = make(tmp_path / "elsewhere")
    assert find_bundle(str(elsewhere)).folder == elsewhere


def test_an_unknown_name_says_which_there_are(own_home):
    assert "dit-trt build" in refusal(find_bundle, "nope")
    three()
    message = refusal(find_bundle, "nope")
    assert "'nope'" in message
    assert "float, b, c, a" in message


@pytest.mark.parametrize("quantized", [False, True])
def test_no_bundle_names_the_command(own_home, quantized):
    if quantized:
        make(bundles_folder() / "float", method="none")
    assert "dit-trt build --method sqs --bits w8a8" in refusal(find_bundle, None, quantized)


def test_the_home_folder_is_the_environments(tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path / "x"))
    assert home() == tmp_path / "x"
    assert bundles_folder() == tmp_path / "x" / "bundles"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DIT_TRT_HOME", "~/y")
    assert home() == tmp_path / "y"


@pytest.mark.parametrize("value", [None, ""])
def test_without_it_home_is_the_users_cache(tmp_path, monkeypatch, value):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DIT_TRT_HOME")
    if value is not None:
        monkeypatch.setenv("DIT_TRT_HOME", value)
    assert home() == tmp_path / "cache" / "dit-trt"
