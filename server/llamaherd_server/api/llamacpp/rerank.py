"""POST /v1/rerank, in Jina's form and in that of text-embeddings-inference (`texts`), as llama-server has it."""

from __future__ import annotations

from typing import Any, Self

from fastapi import APIRouter, Request, Response
from pydantic import Field, model_validator

from llamaherd_server.api.answer import json_response
from llamaherd_server.api.fields import Body
from llamaherd_server.api.openai.embeddings import MOST_INPUTS, compute, floats, input_usage
from llamaherd_server.api.routing import ModelRoute
from llamaherd_server.api.state import state_of
from llamaherd_server.errors import ApiError, unsupported
from llamaherd_server.wire.protocol import Embed

router = APIRouter(route_class=ModelRoute)


class RerankRequest(Body):
    """Documents to put in the order of their relevance to a query."""

    query: str = Field(description="What is looked for.")
    documents: list[str] = Field([], max_length=MOST_INPUTS, description="The texts to rank.")
    texts: list[str] = Field([], max_length=MOST_INPUTS, description="The same; the answer is a list of scores then.")
    top_n: int | None = Field(None, ge=1, description="Answer with so many of the best; left out: with all.")
    return_documents: bool = Field(False, description="True: each result carries its document.")
    return_text: bool = Field(False, description="The same beside `texts`.")
    model: str | None = Field(None, description="A name of /v1/models; left out: the model that is served.")

    @model_validator(mode="after")
    def _has_either(self) -> Self:
        if bool(self.documents) == bool(self.texts):
            raise unsupported("documents", "give the texts to rank in either `documents` or `texts`")
        return self


@router.post("/v1/rerank", response_class=Response)
@router.post("/rerank", response_class=Response, include_in_schema=False)
@router.post("/reranking", response_class=Response, include_in_schema=False)
@router.post("/v1/reranking", response_class=Response, include_in_schema=False)
async def rerank(body: RerankRequest, request: Request) -> Response:
    """The documents' indices and scores, the most relevant first. Needs a model with a ranking head."""
    state = state_of(request)
    state.check_model(body.model, request.state.key)
    if state.model_info().pooling != "rank":
        message = f"model {state.model_name!r} does not rank: serve a reranking model (its GGUF's pooling type is rank)"
        raise ApiError(400, message, param="model", code="unsupported")
    answer = await compute(request, Embed(0, [*(body.documents or body.texts)], body.query))
    scored = sorted(
        ((floats(vector)[0], index) for index, vector in enumerate(answer.vectors)), key=lambda one: -one[0]
    )
    if body.texts:
        texts = body.texts if body.return_text else None
        best = scored[: body.top_n]
        return json_response(
            [{"index": index, "score": score, **({"text": texts[index]} if texts else {})} for score, index in best]
        )
    results: list[dict[str, Any]] = []
    for score, index in scored[: body.top_n]:
        results.append({"index": index, "relevance_score": score})
        if body.return_documents:
            results[-1]["document"] = {"text": body.documents[index]}
    return json_response(
        {"object": "list", "model": state.model_name, "usage": input_usage(answer), "results": results}
    )
