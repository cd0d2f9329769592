"""Damaged and hostile manifests, checkpoints, tables and configs: always one line, never a traceback.

`invoke` holds that: any exception but a clean exit fails. Derandomized, so that CI is the same every time.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manifests import stamped

from dit_trt.engines.bundle import Bundle, list_bundles
from dit_trt.engines.errors import UserError
from dit_trt.engines.manifest import MANIFEST
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.tooling.cli import main
from dit_trt.tooling.tables import load_calibration, shipped_table, table_facts

bounded = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, -1, 2**31, 1e308, 0.5, "", "a\nb", "\ud800", "../x", "CPU", "mel_pca"])
    | st.text(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def paths_in(value: object, prefix: tuple = ()) -> Iterator[tuple]:
    """The place of everything inside a JSON value, containers too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*prefix, key)
        yield from paths_in(inner, (*prefix, key))


def changed(value: dict, path: tuple, new: object, remove: bool) -> dict:
    copy = json.loads(json.dumps(value))
    place = copy
    for key in path[:-1]:
        place = place[key]
    if remove:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return copy


def one_line_or_fine(*arguments: object) -> None:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    if result.exit_code:
        assert result.stdout == ""
        assert [
            line for line in result.stderr.splitlines() if line.startswith("Error: ")
        ] == result.stderr.splitlines()[-1:]


def refused_or_fine(call, *arguments: object) -> bool:  # type: ignore[no-untyped-def]
    """True when it is a UserError of one line (the command line's promise), False when all was well."""
    try:
        call(*arguments)
    except UserError as error:
        assert str(error)
        return True
    return False


@pytest.fixture(scope="module")
def bundle(tiny_sqs: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_sqs.folder, tmp_path_factory.mktemp("fuzz") / "bundle"))


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny, tmp_path_factory.mktemp("fuzz") / "model"))


@bounded
@given(data=st.data())
def test_any_value_in_a_manifest_with_a_valid_hash(
    bundle: Path, tiny_sqs: Bundle, tmp_path: Path, data: st.DataObject
) -> None:
    good = tiny_sqs.manifest
    path = data.draw(st.sampled_from(sorted(paths_in(good), key=str)))
    (bundle / MANIFEST).write_text(stamped(changed(good, path, data.draw(values), data.draw(st.booleans()))))
    if not refused_or_fine(Bundle, bundle):
        one_line_or_fine("run", "rain", "--steps", 1, "--bundle", bundle, "--output", tmp_path)


def test_every_size_misstated_with_a_valid_hash(bundle: Path, tiny_sqs: Bundle, tmp_path: Path) -> None:
    """Numbers of the right type that the graphs do not have."""
    good = tiny_sqs.manifest
    config = ("model", "pretransform", "config")
    places = [("sizes", name) for name in good["sizes"]] + [(*config, n) for n in ("n_fft", "hop_length")]
    for path in places:
        for new in (1, 999):
            (bundle / MANIFEST).write_text(stamped(changed(good, path, new, False)))
            one_line_or_fine("run", "rain", "--steps", 1, "--bundle", bundle, "--output", tmp_path)


@bounded
@given(data=st.data())
def test_any_text_as_a_manifest(bundle: Path, tiny_sqs: Bundle, data: st.DataObject) -> None:
    good = (tiny_sqs.folder / MANIFEST).read_bytes()
    start = data.draw(st.integers(0, len(good)))
    bad = good[:start] + data.draw(st.binary(max_size=20)) + good[start + data.draw(st.integers(0, 50)) :]
    (bundle / MANIFEST).write_bytes(bad)
    assert refused_or_fine(Bundle, bundle) or bad == good
    one_line_or_fine("run", "rain", "--steps", 1, "--bundle", bundle) if bad != good else None
    list_bundles()


@bounded
@given(value=values | st.dictionaries(st.sampled_from(["format", "files", "sha256", "sizes", "model"]), values))
def test_any_json_as_a_manifest(bundle: Path, value: object) -> None:
    (bundle / MANIFEST).write_text(json.dumps(value))
    assert refused_or_fine(Bundle, bundle)


def damaged(good: bytes, kind: str, rng: random.Random) -> bytes:
    """A safetensors file with another header: 8 bytes of length, JSON, data."""
    (length,) = struct.unpack("<Q", good[:8])
    header, body = good[8 : 8 + length], good[8 + length :]
    if kind == "length":
        return struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1])) + good[8:]
    if kind == "cut":
        return good[: rng.randrange(len(good))]
    if kind == "noise":
        return rng.randbytes(rng.randrange(200))
    if kind == "bytes":
        bad = bytearray(header)
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        return good[:8] + bytes(bad) + body
    table = json.loads(header)
    name = rng.choice([key for key in table if key != "__metadata__"])
    change = rng.choice(["dtype", "shape", "data_offsets", "gone", "metadata"])
    new = rng.choice(
        [None, [], [0], [-1], [2**62, 2**62], [0, 4], ["x"], "F16", "I64", "BF16", "F8_E4M3", "nope", {}, 7]
    )
    if change == "gone":
        del table[name]
    elif change == "metadata":
        table["__metadata__"] = rng.choice(
            [{}, {"checkpoint": "x"}, new, {**table.get("__metadata__", {}), "settings": "{"}]
        )
    else:
        table[name][change] = new
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + body


KINDS = ("length", "cut", "noise", "bytes", "field")


@pytest.mark.parametrize("kind", KINDS)
def test_any_header_of_a_checkpoint(model: Path, tiny: Path, tmp_path: Path, kind: str) -> None:
    good = (tiny / "model.safetensors").read_bytes()
    rng = random.Random(kind)
    for _ in range(15):
        (model / "model.safetensors").write_bytes(damaged(good, kind, rng))
        one_line_or_fine("build", "--model", model, "--method", "none", "--output", tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_any_header_of_a_calibration_table(tiny: Path, tiny_table_file: Path, tmp_path: Path, kind: str) -> None:
    checkpoint = Checkpoint.open(str(tiny))
    good, bad = tiny_table_file.read_bytes(), tmp_path / "table.safetensors"
    rng = random.Random(kind)
    refused = 0
    for _ in range(60):
        bad.write_bytes(damaged(good, kind, rng))
        refused += refused_or_fine(load_calibration, bad, checkpoint) or refused_or_fine(table_facts, bad)
    assert refused > 30


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_shipped_table_is_as_none(tiny: Path, tiny_table_file: Path, model: Path, kind: str) -> None:
    shutil.copy(tiny / "model.safetensors", model)
    checkpoint = Checkpoint.open(str(model))
    rng = random.Random(kind)
    for _ in range(20):
        (model / "calibration.safetensors").write_bytes(damaged(tiny_table_file.read_bytes(), kind, rng))
        refused_or_fine(shipped_table, checkpoint)
    (model / "calibration.safetensors").unlink()


@bounded
@given(data=st.data())
def test_any_value_in_a_model_config(model: Path, tiny: Path, data: st.DataObject) -> None:
    """Reading the checkpoint and every part of it, all but the export, which takes seconds."""
    good = json.loads((tiny / "model_config.json").read_text())
    path = data.draw(st.sampled_from(sorted(paths_in(good), key=str)))
    (model / "model_config.json").write_text(
        json.dumps(changed(good, path, data.draw(values), data.draw(st.booleans())))
    )
    shutil.copy(tiny / "model.safetensors", model)

    def read() -> None:
        from dit_trt.exporters.conditioners import MultiConditioner
        from dit_trt.exporters.pretransforms import decoder_from_config
        from dit_trt.tooling.build import bundle_sizes

        checkpoint = Checkpoint.open(str(model))
        checkpoint.tokenizer_file, checkpoint.digest, bundle_sizes(checkpoint)
        import torch

        with torch.device("meta"):
            MultiConditioner(checkpoint.config)
            decoder_from_config(checkpoint.config)

    refused_or_fine(read)
