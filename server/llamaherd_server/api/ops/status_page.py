"""GET /: what the server does, for people; no script, no request but its own, read again every few seconds."""

from __future__ import annotations

from html import escape

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from llamaherd_server.api.routing import ModelRoute
from llamaherd_server.api.state import AppState, state_of

router = APIRouter(route_class=ModelRoute)

_REFRESH_S = 3
_COLUMNS = ("model", "engine", "state", "slots busy", "waiting", "KV cells in use", "prompt tokens found", "drafts")
_STYLE = """
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: left; border-bottom: 1px solid #8886; }
meter { width: 6rem; }
@media (max-width: 40rem) {
  thead { display: none; }
  tr { display: block; margin-bottom: 1rem; }
  td { display: flex; justify-content: space-between; }
  td::before { content: attr(data-name); }
}
"""
# Nothing but the style above: a model's name is somebody's text.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


@router.get("/", include_in_schema=False)
async def status_page(request: Request) -> HTMLResponse:
    """Models, slots, queue and tokens/s as they are now. Without a key for this machine only, like /metrics."""
    state = state_of(request)
    models = state.all()
    word = "draining" if state.lifecycle.draining else "ready" if state.lifecycle.ready() else "not ready"
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    rows = "".join(f"<tr>{_row(model)}</tr>" for model in models)
    return HTMLResponse(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>llamaherd: {word}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="{_REFRESH_S}"><style>{_STYLE}</style></head>
<body><h1>llamaherd: {word}, {state.lifecycle.tokens_per_s:.0f} tokens/s</h1>
<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></body></html>
""",
        headers=_HEADERS,
    )


def _row(model: AppState) -> str:
    status = model.engine.status()
    stats = status.stats
    waiting = model.serving.admission.queued + (stats.waiting if stats else 0)
    cells = (
        model.model_name,
        status.kind,
        status.state,
        f"{stats.slots_busy if stats else 0} of {status.settings.parallel}",
        str(waiting),
    )
    used, size = (stats.kv_used, stats.kv_size) if stats else (0, 0)
    kv = f'<meter max="{max(size, 1)}" value="{used}">{used}</meter> {used} of {size}'
    prompt = stats.prompt_tokens if stats else 0
    found = f"{100 * stats.cached_tokens / prompt:.0f} % of {prompt}" if stats and prompt else "-"
    drafted = stats.drafted_tokens if stats else 0
    drafts = f"{100 * stats.accepted_tokens / drafted:.0f} % of {drafted}" if stats and drafted else "-"
    texts = [*map(escape, cells), kv, found, drafts]
    return "".join(f'<td data-name="{name}">{text}</td>' for name, text in zip(_COLUMNS, texts, strict=True))
