"""Any network as ONNX: `onnx:FILE.onnx`, with FILE.json beside it that says what it takes and gives.

    {"name": "OpenL3", "kind": "embedding", "sample_rate": 44100, "channels": "stereo-apart",
     "window_seconds": 1.0, "hop_seconds": 0.5, "centred": false, "rest": false}

The graph has one input, float32 [windows, samples], and its first output is float32 [windows, d]. channels: `mono`
(the mean), or `stereo-apart` (left and right one after the other, their outputs side by side: [windows, 2 d]).
These may be left out: centred, rest (see `embedders.windows`); peak_db, to which the sound's peak is brought, that of
both sides together (default: left as it is); through_rate, to which it is resampled on its way to sample_rate, so that
nothing above half of it is heard; a "notice" to show.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...engines.errors import UserError
from ...engines.home import read_json, sha256
from .embedders import Float, Kind, at_peak, mono, resampled, windows

KINDS, CHANNELS = ("embedding", "logits"), ("mono", "stereo-apart")
FIELDS = ("name", "kind", "sample_rate", "channels", "window_seconds", "hop_seconds")


class OnnxEmbedder:
    """An Embedder run by ONNX Runtime on the CPU.

    facts: in place of the JSON beside it. Raises UserError for a file or description that does not fit.
    """

    kind: Kind

    def __init__(self, path: Path, facts: Mapping[str, Any] | None = None):
        beside = path.with_suffix(".json")
        if facts is None:
            facts = read_json(beside, "it says what the network takes (docs/evaluation.md)")
        if missing := [field for field in FIELDS if field not in facts]:
            raise UserError(f"{beside} does not say its {', '.join(missing)}")
        if facts["kind"] not in KINDS or facts["channels"] not in CHANNELS:
            raise UserError(f"{beside}: kind is one of {', '.join(KINDS)}; channels one of {', '.join(CHANNELS)}")
        self.name, self.kind, self.notice = facts["name"], facts["kind"], facts.get("notice")
        self._rate, self._apart = int(facts["sample_rate"]), facts["channels"] == "stereo-apart"
        self._window, self._hop = (round(facts[f"{k}_seconds"] * self._rate) for k in ("window", "hop"))
        self._through = int(facts.get("through_rate", self._rate))
        self._peak = None if facts.get("peak_db") is None else float(facts["peak_db"])
        if min(self._rate, self._through, self._window, self._hop) < 1:
            raise UserError(f"{beside}: rates, window_seconds and hop_seconds must be positive")
        self._framing = {name: bool(facts.get(name, False)) for name in ("centred", "rest")}
        import onnxruntime

        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes have no common base
            raise UserError(f"{path} is not a graph that ONNX Runtime opens: {str(error).splitlines()[0]}") from None
        self._path = path
        self.version = f"{_digest(path)[:16]} {json.dumps(dict(facts), sort_keys=True)}"
        self._input, self._output = self._session.get_inputs()[0].name, self._session.get_outputs()[0].name

    def embed(self, audio: Float, rate: int) -> Float:
        """audio [channels, samples] -> [windows, d]"""
        if not self._apart:
            return self._run(self._at_peak(mono(audio, rate, self._through)))
        both = self._at_peak(audio if len(audio) == 2 else np.repeat(audio[:1], 2, axis=0))
        return np.concatenate([self._run(channel) for channel in resampled(both, rate, self._through)], axis=1)

    def _at_peak(self, audio: Float) -> Float:
        return audio if self._peak is None else at_peak(audio, self._peak)

    def _run(self, audio: Float) -> Float:
        """audio [samples] at through_rate"""
        audio = resampled(audio[None], self._through, self._rate)[0]
        parts = windows(audio, self._window, self._hop, **self._framing)
        try:
            found = np.asarray(self._session.run([self._output], {self._input: parts})[0], np.float32)
        except Exception as error:  # as above
            raise UserError(
                f"{self._path} does not take [{', '.join(map(str, parts.shape))}], the sound's windows by samples: "
                f"{str(error).splitlines()[0]}"
            ) from None
        if found.ndim != 2 or len(found) != len(parts):
            raise UserError(f"{self._path} makes {list(found.shape)} of {len(parts)} windows; it must be [windows, d]")
        return found


def _digest(path: Path) -> str:
    """sha256 of a graph and of the files that hold its weights, where they are not inside."""
    import onnx

    tensors = onnx.load(path, load_external_data=False).graph.initializer
    places = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    files = [path, *(path.parent / place for place in sorted(places))]
    if len(files) == 1:
        return sha256(path)
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
