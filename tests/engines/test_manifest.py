"""Opening a bundle: an unchanged manifest of well-formed fields, and every file that it lists."""

import json
import random

import pytest
from bundles import FILES, LAYER, SIZES, edit, fill, manifest, refusal
from manifests import restamped

from dit_trt.engines.bundle import Bundle, new_bundle
from dit_trt.engines.errors import UserError
from dit_trt.engines.manifest import FORMAT, MANIFEST, REQUIRED, step_graphs, write_manifest


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
    "text", ["[]", "3", "{}", '{"format": 1}', '{"format": 5}', '{"format": "4"}', '{"format": 4.0}']
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
        *(
            ("layers", value)
            for value in (
                None,
                {},
                [7],
                [{}],
                [{**LAYER, "bits": 8}],
                [{**LAYER, "bytes": "7"}],
                [{**LAYER, "branch_bytes": -1}],
            )
        ),
        *((f"recipe.{name}", value) for name in ("method", "bits") for value in (None, 3, [], "")),
        *((f"model.{name}", value) for name in ("name", "source", "digest", "licence") for value in (None, 3, [])),
        *(
            (f"schedule.{name}", value)
            for name in ("steps", "sampler", "cfg", "seed", "sigma_min")
            for value in (None, [])
        ),
        ("created", "yesterday"),
        ("created", "2026-01-01T00:00:00"),
        ("model.digest", "0" * 63),
        ("model.pretransform", None),
        ("model.pretransform.config", []),
        *((f"model.pretransform.config.{name}", bad) for name in ("n_fft", "hop_length") for bad in (None, 0, "7")),
        ("model.pretransform.type", 3),
        ("schedule.seed", -1),
        ("tokenizer", None),
        *(("tokenizer.special_tokens", value) for value in (None, 1, 0, "true", [])),
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


@pytest.mark.parametrize("kind", ["mel_pca", "mel_vocoder"])
@pytest.mark.parametrize("name", ["n_fft", "hop_length", "griffin_lim_iterations"])
def test_a_decoder_without_what_its_sound_is_made_by_is_refused(bundle, kind, name):
    def change(values):
        values["model"]["pretransform"]["type"] = kind
        del values["model"]["pretransform"]["config"][name]

    edit(bundle, change)
    if kind == "mel_vocoder" and name == "griffin_lim_iterations":
        assert Bundle(bundle).verify()
    else:
        assert "lacks or misstates model.pretransform" in refusal(Bundle, bundle)


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
    folder = tmp_path / "one"
    with pytest.raises(UserError, match=r"misstates sizes.tile_latents"), new_bundle(folder) as work:
        fill(work, {**FILES, **more})
        Bundle(work)
    with new_bundle(folder) as work:
        for name, content in {**FILES, **more}.items():
            (work / name).write_bytes(content)
        values = manifest()
        values["sizes"] |= {"tile_latents": 7, "tile_overlap": 2, "encoder_channels": 2}
        write_manifest(work, values)
    assert Bundle(folder).verify().manifest["files"].keys() == FILES.keys() | more.keys()
    edit(folder, lambda values: values["files"].pop("encoder.onnx.data"))
    assert "does not list encoder.onnx.data" in refusal(Bundle, folder)


GOOD_SIGMAS = [[], [1], [300.0, 2, 0.5], [5e-324], [1.7e308]]
BAD_SIGMAS = [None, 7, "9", {}, [None], ["9"], [True], [[9.0]], [0], [-1.0], [1.0, 2.0], [2.0, 2.0], [2.0, 0.0]]


def several_steps(folder, step_sigmas, scales=None, without=""):
    """A bundle of as many step graphs; scales: n of `step_scales`, with the files of it."""
    files = dict(FILES)
    for index in range(len(step_sigmas) + 1):
        graph = f"step-{index}" if index else "step"
        files |= {f"{graph}.onnx": b"a graph", f"{graph}.onnx.data": b"weights"}
        files |= {} if scales is None else {f"{graph}.scales.safetensors": b"scales"}
    values = {**manifest(), "step_sigmas": step_sigmas}
    values["sizes"] |= {} if scales is None else {"step_scales": scales}
    with new_bundle(folder) as work:
        for name in files.keys() - {without}:
            (work / name).write_bytes(files[name])
        write_manifest(work, values)
    return folder


@pytest.mark.parametrize("step_sigmas", GOOD_SIGMAS, ids=str)
@pytest.mark.parametrize("scales", [None, 1, 2**31 - 1])
def test_several_step_graphs(tmp_path, step_sigmas, scales):
    found = Bundle(several_steps(tmp_path / "one", step_sigmas, scales)).verify()
    graphs = step_graphs(found.manifest["step_sigmas"])
    assert graphs == ("step", "step-1", "step-2", "step-3")[: len(step_sigmas) + 1]
    assert {f"{graph}.onnx.data" for graph in graphs} < found.manifest["files"].keys()


@pytest.mark.parametrize("bad", BAD_SIGMAS, ids=str)
def test_bounds_that_do_not_fall_are_refused(bundle, bad):
    edit(bundle, lambda values: values.update(step_sigmas=bad))
    assert refusal(Bundle, bundle).endswith("lacks or misstates step_sigmas; build the bundle again")


def test_an_endless_bound_is_refused(tmp_path):
    folder = several_steps(tmp_path / "one", [77.25])
    text = (folder / MANIFEST).read_text().replace("77.25", "1e999")
    stamp = json.loads(text)["sha256"]
    (folder / MANIFEST).write_text(restamped(text, stamp))
    assert "lacks or misstates step_sigmas" in refusal(Bundle, folder)


@pytest.mark.parametrize("bad", [None, 0, -1, 1.0, True, "7", [], 2**31])
def test_misstated_step_scales_are_refused(bundle, bad):
    edit(bundle, lambda values: values["sizes"].update(step_scales=bad))
    assert refusal(Bundle, bundle).endswith("lacks or misstates sizes.step_scales; build the bundle again")


@pytest.mark.parametrize(
    "name",
    [f"step{end}" for end in ("-1.onnx", "-2.onnx.data", "-2.scales.safetensors", ".scales.safetensors", ".onnx")],
)
def test_a_missing_part_of_several_steps_is_named(tmp_path, name):
    with pytest.raises(UserError, match=f"does not list {name}") as error:
        several_steps(tmp_path / "one", [9.0, 2.0], 7, without=name)
    assert "\n" not in str(error.value) and not (tmp_path / "one").exists()


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
