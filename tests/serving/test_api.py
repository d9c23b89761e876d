"""Whatever the description of the API allows, and what it does not: an answer or a refusal, never a failure."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis")

ROOT = str(Path(__file__).parents[2])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_call_breaks_the_server(server, mode):
    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses = set()
    operations = [found.ok() for found in description.get_all_operations()]
    for operation in operations:
        if mode == "negative" and not operation.body:
            continue  # nothing in it can be wrong
        strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))

        @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def call(case):
            response = case.call(timeout=60)
            statuses.add(response.status_code)
            assert response.status_code < 500, response.text
            assert "Traceback" not in response.text and ROOT not in response.text
            if response.status_code >= 400 and case.method != "HEAD":
                assert response.json()["error"]["message"]

        call()
    assert statuses >= ({200, 400} if mode == "positive" else {400})
    assert server.is_idle()
