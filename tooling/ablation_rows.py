"""The rows of the ablation table: every method of the paper, ours, and the peers, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from ..engines.errors import UserError
from .peers import PEERS
from .recipe import Recipe

BASELINE = "w8a8-sqs"  # what latencies are ratios to, on the same backend


@dataclass(frozen=True)
class Row:
    """One line of the table. recipe: keyword arguments of `Recipe`; or the name of a peer; or step_channel, the bits
    of the paper's own simulation, which is no engine and is not timed.

    name: `<backend>/<slug>`, for --rows. label: what the table calls it.
    """

    backend: str
    slug: str
    label: str
    recipe: Mapping[str, object] = field(default_factory=dict)
    peer: str | None = None
    step_channel: Literal[8, 4] | None = None

    @property
    def is_bundle(self) -> bool:
        return self.peer is None and self.step_channel is None

    @property
    def name(self) -> str:
        return f"{self.backend}/{self.slug}"

    def to_recipe(self) -> Recipe:
        return Recipe(**self.recipe)  # type: ignore[arg-type]


_SVDQUANT = {"lora_rank": 32, "lora_form": "svdquant"}
_RESIDUAL = {"lora_rank": 32, "lora_form": "residual"}
_PAIR = {"cfg_pair": "difference"}
_NARROW = {"bits": "w7a8"}
_CHANNEL = {"bits": "w4a8", "group_size": 0, "alpha": 0.5}
_GROUP = {"bits": "w4a8", "group_size": 64, "alpha": 0.5}
_SEARCHED = {"alpha": "auto", "clip": True}
_GPTQ = {"rounding": "gptq"}

# slug -> label, recipe. The paper's alpha is 0.5, our default for 8 bits 0.95.
_RECIPES: dict[str, tuple[str, dict[str, object]]] = {
    "fp32": ("FP32", {"method": "none"}),
    "w8a8-plain": ("W8A8, no smoothing", {"method": "sqs", "smooth": False}),
    "w8a8-sqs-0.5": ("W8A8 SQS, alpha 0.5 (the paper's)", {"method": "sqs", "alpha": 0.5}),
    BASELINE: ("W8A8 SQS", {"method": "sqs"}),
    "w8a8-sqs-searched": ("W8A8 SQS, alpha auto, clipped", {"method": "sqs", **_SEARCHED}),
    "w8a8-sqd-0.5": ("W8A8 SQD shared, alpha 0.5", {"method": "sqd", "alpha": 0.5}),
    "w8a8-sqd": ("W8A8 SQD shared", {"method": "sqd"}),
    "w8a8-sqd-requantize": ("W8A8 SQD requantize", {"method": "sqd", "sqd_weights": "requantize"}),
    "w8a8-sqd-grouped": ("W8A8 SQD grouped:4", {"method": "sqd", "sqd_weights": "grouped:4"}),
    "w8a8-sqd-residual": ("W8A8 SQD shared + rank 32, residual", {"method": "sqd", **_RESIDUAL}),
    "w8a8-sqt": ("W8A8 sqt", {"method": "sqt"}),
    "w8a8-sqt-svdquant": ("W8A8 sqt + rank 32, svdquant", {"method": "sqt", **_SVDQUANT}),
    "w8a8-pair-sqs": ("W8A8 SQS, pair", {"method": "sqs", **_PAIR}),
    "w8a8-pair-sqd": ("W8A8 SQD shared, pair", {"method": "sqd", **_PAIR}),
    "w8a8-pair-sqt": ("W8A8 sqt, pair", {"method": "sqt", **_PAIR}),
    "w8a8-pair-sqt-svdquant": ("W8A8 sqt + rank 32, svdquant, pair", {"method": "sqt", **_PAIR, **_SVDQUANT}),
    "w7a8-sqs": ("W7A8 SQS", {"method": "sqs", **_NARROW}),
    "w7a8-sqt": ("W7A8 sqt", {"method": "sqt", **_NARROW}),
    "w7a8-pair-sqt": ("W7A8 sqt, pair", {"method": "sqt", **_NARROW, **_PAIR}),
    "w4a8-sqs": ("W4A8 SQS", {"method": "sqs", **_CHANNEL}),
    "w4a8-sqd": ("W4A8 SQD shared", {"method": "sqd", **_CHANNEL}),
    "w4a8-sqd-residual": ("W4A8 SQD shared + rank 32, residual", {"method": "sqd", **_CHANNEL, **_RESIDUAL}),
    "w4a8-g64-sqt": ("W4A8 groups of 64, sqt", {"method": "sqt", **_GROUP}),
    "w4a8-pair-sqt": ("W4A8 groups of 64, sqt, pair", {"method": "sqt", **_GROUP, **_PAIR}),
    "w4a8-pair-gptq": (
        "W4A8 groups of 64, sqt, GPTQ, searched, pair",
        {"method": "sqt", **_GROUP, **_PAIR, **_GPTQ, **_SEARCHED},
    ),
    "w4a8-pair-best": (
        "W4A8 groups of 64, sqt + rank 32, GPTQ, searched, pair",
        {"method": "sqt", **_GROUP, **_PAIR, **_GPTQ, **_SEARCHED, **_SVDQUANT},
    ),
    "w4a8-pair-rank64": (
        "W4A8 groups of 64, sqt + rank 64, GPTQ, searched, pair",
        {"method": "sqt", **_GROUP, **_PAIR, **_GPTQ, **_SEARCHED, "lora_rank": 64},
    ),
    "w4a8-memory": (
        "W4A8 groups of 64, in memory, GPTQ, searched, pair",
        {"method": "sqt", "w4": "memory", **_GROUP, **_PAIR, **_GPTQ, **_SEARCHED},
    ),
}

_PEER_LABELS = {
    "nncf-int8": "NNCF quantize, transformer",
    "nncf-int8-same": "NNCF quantize, transformer, the same Linears as ours",
    "nncf-int4": "NNCF int4 weights, groups of 64",
    "ort-static": "ONNX Runtime quantize_static",
    "ort-dynamic": "ONNX Runtime quantize_dynamic",
}

# The second backend repeats what the recommendation rests on.
_ON_ONNXRUNTIME = (
    "fp32",
    BASELINE,
    "w8a8-sqd",
    "w8a8-pair-sqs",
    "w8a8-pair-sqt",
    "w8a8-pair-sqt-svdquant",
    "w7a8-sqs",
    "w7a8-sqt",
    "w7a8-pair-sqt",
    "w4a8-pair-best",
)


def _rows(backend: str, slugs: Iterable[str]) -> list[Row]:
    own = [Row(backend, slug, *_RECIPES[slug]) for slug in slugs]
    peers = [Row(backend, name, _PEER_LABELS[name], peer=name) for name in PEERS if PEERS[name].backend == backend]
    return own + peers


_SIMULATED: list[tuple[Literal[8, 4], str]] = [(8, "W8A8"), (4, "W4A8")]
ROWS = (
    *_rows("openvino", _RECIPES),
    *(
        Row(
            "openvino",
            f"step-channel-{name.lower()}",
            f"{name} SQD, the paper's simulation, alpha 0.5",
            step_channel=bits,
        )
        for bits, name in _SIMULATED
    ),
    *_rows("onnxruntime", _ON_ONNXRUNTIME),
)


def chosen_rows(pattern: str) -> list[Row]:
    """The rows whose name `pattern`, wildcards and all, matches; several patterns have commas between them.

    Raises UserError when one matches none.
    """
    patterns = pattern.split(",")
    for each in patterns:
        if not any(fnmatchcase(row.name, each) for row in ROWS):
            raise UserError(f"--rows {each} matches no row; there are: {', '.join(row.name for row in ROWS)}")
    return [row for row in ROWS if any(fnmatchcase(row.name, each) for each in patterns)]
