"""The service keeps the word of its own OpenAPI: Schemathesis sends what it describes and what it forbids."""

from __future__ import annotations

from collections import Counter

import hypothesis
import pytest
import schemathesis
from schemathesis.generation import GenerationMode

TOKEN = "a-token-for-the-tests"
BOUNDED = hypothesis.settings(
    max_examples=25,
    phases=[hypothesis.Phase.generate],  # no shrinking, which takes minutes
    database=None,
    suppress_health_check=[*hypothesis.HealthCheck],
)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_answers_are_as_openapi_says(serve, mode):
    """Every check of Schemathesis: status codes, content types, headers and bodies as documented, what is forbidden
    refused, what is valid accepted, the token not ignored, no 5xx.
    """
    service = serve(steps=2, token=TOKEN)
    bearing = {"Authorization": f"Bearer {TOKEN}"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", service.app, headers=bearing)
    answers: Counter[tuple[str, int]] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # nothing to do wrong

        @hypothesis.seed(1)
        @BOUNDED
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def holds(case):
            answer = case.call_and_validate(headers=bearing)
            answers[case.path, answer.status_code] += 1

        holds()
    post = {status: count for (path, status), count in answers.items() if path == "/v1/audio/generations"}
    if mode is GenerationMode.POSITIVE:
        assert post.keys() == {200}
        assert {path for path, _ in answers} == {*schema.raw_schema["paths"]}
    else:  # 200: only the header with the token was to be wrong, and is the right one nevertheless
        assert post.keys() <= {200, 400, 401, 415, 422}
        assert post[422] >= 10
