"""The documentation that clients are generated from."""

from __future__ import annotations

from .conftest import Serve
from .double import Double


async def test_every_field_states_its_behaviour_and_422_is_never_promised(serve: Serve) -> None:
    async with serve(Double()) as served:
        document = (await served.http.get("/openapi.json")).json()
    for name in ("ChatRequest", "CompletionRequest"):
        fields = document["components"]["schemas"][name]["properties"]
        assert [field for field, schema in fields.items() if not schema.get("description")] == []
    for operations in document["paths"].values():
        for operation in operations.values():
            assert operation["description"]
            assert set(operation["responses"]) == {"200", "4XX", "5XX"}
