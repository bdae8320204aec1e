"""Who may learn from `cached_tokens` what another has asked."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from llamaherd_server.keyfile import add

from ..conftest import running


@pytest.mark.parametrize(("limits", "others"), [({}, 0), ({"prompt_cache_scope": "server"}, 1)])
def test_a_key_shares_prefixes_with_itself_and_with_others_only_where_set(
    tmp_path: Path, limits: dict[str, str], others: int
) -> None:
    keys = tmp_path / "keys.toml"
    one, other = ({"Authorization": f"Bearer {add(keys, {'name': name})}"} for name in ("one", "other"))
    with running(tmp_path, auth={"keys_file": keys}, limits=limits) as server:

        def cached(key: dict[str, str]) -> int:
            body = {"prompt": "The number of the safe is 271828, as all of the herd know.", "max_tokens": 1}
            usage = httpx.post(f"{server.url}/v1/completions", json=body, headers=key, timeout=60).json()["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        assert cached(one) == 0
        assert cached(one) > 0
        assert min(cached(other), 1) == others
