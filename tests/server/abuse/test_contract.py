"""Schemathesis over the OpenAPI document: what it promises, and nothing that breaks the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from llamaherd_server.app import create_app
from llamaherd_server.config.settings import Settings

from ..api.double import Double
from ..conftest import paced, running

EXAMPLES = 40
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    engine = {"parallel": 8, "ctx_per_slot": 64, "batch": 64, "ubatch": 64}
    environment = paced(step_ms=1, tokens=1) | {"LLAMA_CPP_LIB_PATH": "/nowhere/lib"}  # no llama-server to switch to
    with running(tmp_path_factory.mktemp("contract"), environment, engine=engine) as server:
        yield server.url


# The document does not depend on the model: any file will do for its path.
app = create_app(Settings.model_validate({"model": {"name": "smollm2", "path": __file__}}), lambda _: Double())
schema = schemathesis.openapi.from_dict(app.openapi())


Operation: TypeAlias = APIOperation[Any, Any, Any, Any]
OPERATIONS = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
assert len(OPERATIONS) > 20


# Not schema.parametrize(): it gives all operations one node id, of which pytest-xdist runs one.
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label.replace("/", "."))
@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_every_answer_is_one_that_the_document_promises(operation: Operation, url: str, data: st.DataObject) -> None:
    case = data.draw(operation.as_strategy())
    case.call_and_validate(base_url=url, checks=CHECKS, timeout=60)
