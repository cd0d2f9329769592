"""The fields of a request and their limits: as OpenAPI shows them, and as a line that names what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from ..pipeline import Pipeline
from ..samplers import SAMPLERS_OF
from ..settings import Settings

MAX_PROMPT = 2000  # letters; models see some 128 tokens
MAX_BODY = 64_000  # bytes; two prompts of the longest letters fit
MAX_SEED = 2**53 - 1  # to many clients JSON's numbers are doubles, which hold no larger integers
FORMATS = {"wav": "audio/wav", "flac": "audio/flac"}


def _integer(least: int, most: int) -> Any:
    """JSON has one kind of number: 7.0 is an integer, too. (The bounds stand before the validator, or no schema shows
    them.)
    """
    whole = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
    return Annotated[int, Field(ge=least, le=most), whole]


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, whatever the model can."""

    steps: int
    seconds: float

    def longest(self, pipeline: Pipeline) -> float:
        """Seconds of a clip."""
        return min(pipeline.longest_seconds, self.seconds)

    def settings(self, pipeline: Pipeline, **chosen: Any) -> Settings:
        """The model's own defaults, at most what is allowed. Raises UserError."""
        settings = pipeline.settings(**chosen)
        if settings.steps > self.steps and "steps" not in chosen:
            settings = pipeline.settings(**chosen, steps=self.steps)
        pipeline.check_sampler(settings)
        return settings

    def length(self, pipeline: Pipeline, seconds: float | None) -> float:
        """The length to make. Raises UserError."""
        return pipeline.check_seconds(min(pipeline.check_seconds(None), self.seconds) if seconds is None else seconds)


def request_model(models: Sequence[str], pipelines: Sequence[Pipeline], limits: Limits) -> type[BaseModel]:
    """The body's type. models: the names of the bundles, the first of them being the default."""
    longest = max(limits.longest(pipeline) for pipeline in pipelines)
    samplers = [name for objective in dict.fromkeys(p.objective for p in pipelines) for name in SAMPLERS_OF[objective]]

    def described(kind: Any, text: str, **more: Any) -> Any:
        return Annotated[kind, Field(description=text, **more)]

    def optional(kind: Any, text: str, **limits: Any) -> Any:
        return described(Annotated[kind, Field(**limits)] | None, text), None

    return create_model(
        "Generation",
        __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False),
        prompt=described(str, "What to hear.", min_length=1, max_length=MAX_PROMPT, pattern=r"\S"),
        model=optional(Literal[tuple(models)], f"Which bundle (default: {models[0]})."),
        seconds=optional(float, "Length (default: 10, or the longest).", ge=0.1, le=longest),
        seed=(described(_integer(0, MAX_SEED), "The same seed gives the same bytes."), 1000),
        steps=optional(_integer(1, limits.steps), "Sampling steps (default: the model's own)."),
        cfg=optional(float, "Guidance scale (default: the model's own).", ge=0, le=100),
        sampler=optional(Literal[tuple(samplers)], "Default: the model's own."),
        negative_prompt=optional(str, "What it should not sound like.", max_length=MAX_PROMPT),
        format=(described(Literal[tuple(FORMATS)], "16-bit samples."), "wav"),
    )


def faults(model: type[BaseModel], errors: Sequence[Any]) -> dict[str, str]:
    """field -> what is wrong with it. errors: pydantic's own."""
    return {field: _fault(field, error, model) for error in errors for field in [_field(error)]}


def _field(error: Any) -> str:
    named = [part for part in error["loc"] if part != "body"]
    return str(named[0])[:40] if named and isinstance(named[0], str) else "body"


def _fault(field: str, error: Any, model: type[BaseModel]) -> str:
    kind = error["type"]
    if field == "body" or kind == "json_invalid":
        return "the body must be a JSON object, sent with the content type application/json"
    if kind == "missing":
        return f"{field} is missing"
    if kind == "extra_forbidden":
        return f"{field!a} is no field (one of: {', '.join(model.model_fields)})"
    if kind == "string_too_long":
        return f"{field} is longer than {error['ctx']['max_length']} characters"
    if kind in ("string_too_short", "string_pattern_mismatch"):
        return f'{field} is empty; say what to hear, for example "dog barking"'
    if kind in ("greater_than_equal", "less_than_equal"):
        return f"{field} is outside {_range(field, model)}"
    if kind == "literal_error":
        return f"{field} must be one of: {error['ctx']['expected'].replace(' or ', ', ')}"
    return f"{field}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _range(field: str, model: type[BaseModel]) -> str:
    schema = model.model_json_schema()["properties"][field]
    number = next(kind for kind in (schema, *schema.get("anyOf", [])) if "minimum" in kind)
    return f"{number['minimum']:g}..{number['maximum']}"
