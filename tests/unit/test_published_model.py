"""Finding a published model: over a double of the hub, its files, their sums, and a header by range requests."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.hub import COMMIT, Hub, serving
from tests.unit.test_gguf import SMALL, file, text

WEIGHTS = bytes(1000)
# A vocabulary that ends far behind the first range.
LARGE = file(SMALL[24:] + text("a.scores") + struct.pack("<IIQ", 9, 6, 1 << 20) + bytes(4 << 20), 8) + bytes(30 << 20)


def part(number: int, count: int = 3) -> bytes:
    keys = text("split.no") + struct.pack("<IH", 2, number) + text("split.count") + struct.pack("<IH", 2, count)
    return (file(SMALL[24:] + keys, 9) if number == 0 else file(keys, 2)) + bytes([number]) * 100


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {
        "README.md": b"",
        "mmproj-model-f16.gguf": SMALL,
        "model.imatrix.gguf": SMALL,
        "small-Q4_K_M.gguf": SMALL + WEIGHTS,
        "small-Q8_0.gguf": SMALL + 2 * WEIGHTS,
        "small-UD-Q4_K_XL.gguf": SMALL + WEIGHTS + b"xl",
        **{f"F16/small-F16-0000{number + 1}-of-00003.gguf": part(number) for number in range(3)},
    }
    twice = {"a-Q4_0.gguf": SMALL, "b-q4_0.gguf": SMALL}
    lacking = {"m-Q4_0-00001-of-00003.gguf": part(0), "m-Q4_0-00003-of-00003.gguf": part(2)}
    foreign = {"m-Q4_0-00001-of-00002.gguf": part(0), "m-Q4_0-00002-of-00002.gguf": part(1)}
    repos = {"small-GGUF": files, "twice": twice, "lacking": lacking, "foreign": foreign, "none": {"model.bin": b""}}
    repos |= {"large": {"large-Q8_0.gguf": LARGE}, "gated": dict(files), "page": {"m-Q8_0.gguf": b"<html>"}}
    with serving(Hub({f"o/{name}": files for name, files in repos.items()}, {"o/gated"}, "hf_secret")) as hub:
        yield hub


def search(published_model: ModuleType, hub: Hub, model: str, **params: Any) -> dict[str, Any]:
    defaults = {"name": "", "sha256": [], "hub_url": hub.url, "hub_token": "", "https_token": ""}
    found: dict[str, Any] = published_model.Search({"model": model, **defaults, **params}).run()
    return found


def test_a_quantization_becomes_file_commit_and_sha256(published_model: ModuleType, hub: Hub) -> None:
    entry = search(published_model, hub, "hf:o/small-GGUF:q4_k_m")["entry"]
    assert entry == {
        "name": "small",
        "sha256": hashlib.sha256(SMALL + WEIGHTS).hexdigest(),
        "source": {"kind": "hf", "repo": "o/small-GGUF", "file": "small-Q4_K_M.gguf", "revision": COMMIT},
    }
    for same in (f"hf:o/small-GGUF@{COMMIT}:Q4_K_M", "hf:o/small-GGUF/small-Q4_K_M.gguf"):
        assert search(published_model, hub, same)["entry"] == entry
    for kind in ("resolve", "blob"):
        assert search(published_model, hub, f"{hub.url}/o/small-GGUF/{kind}/main/small-Q4_K_M.gguf")["entry"] == entry
    named = search(published_model, hub, "hf:o/small-GGUF:UD-Q4_K_XL", name="chat")["entry"]
    assert (named["name"], named["source"]["file"]) == ("chat", "small-UD-Q4_K_XL.gguf")


def test_a_split_model_is_one_entry_with_all_sums(published_model: ModuleType, hub: Hub) -> None:
    found = search(published_model, hub, "hf:o/small-GGUF:F16")
    assert found["entry"]["source"]["file"] == "F16/small-F16-00001-of-00003.gguf"
    assert found["entry"]["sha256"] == [hashlib.sha256(part(number)).hexdigest() for number in range(3)]
    assert found["choices"][0]["bytes"] == sum(len(part(number)) for number in range(3))
    second = search(published_model, hub, "hf:o/small-GGUF/small-F16-00002-of-00003.gguf")
    assert second["entry"] == found["entry"]


def test_without_a_quantization_all_models_are_listed(published_model: ModuleType, hub: Hub) -> None:
    found = search(published_model, hub, "hf:o/small-GGUF")
    assert found["entry"] == {}
    assert {one["quantization"] for one in found["choices"]} == {"Q4_K_M", "Q8_0", "UD-Q4_K_XL", "F16"}
    assert found["choices"] == sorted(found["choices"], key=lambda one: one["bytes"])
    assert found["shape"]["kv_heads"] == [2, 2]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("hf:o/small-GGUF:Q4_K", r"no Q4_K; the nearest is (UD-)?Q4_K_(M|XL); it has "),
        ("hf:o/small-GGUF/small-Q5_0.gguf", r"no small-Q5_0.gguf; the nearest is small-Q"),
        ("hf:o/small-GGUF/mmproj-model-f16.gguf", "is a projector"),
        ("hf:o/small-GGUF@gone:Q8_0", r"no such revision \(404\)"),
        ("hf:o/twice:Q4_0", "has 2 models Q4_0: a-Q4_0.gguf, b-q4_0.gguf; name one as hf:o/twice/FILE"),
        ("hf:o/lacking:Q4_0", "m-Q4_0-00002-of-00003.gguf is missing"),
        ("hf:o/foreign:Q4_0", "split.count 3, the repository has 2 parts"),
        ("hf:o/none", "has no GGUF model"),
        ("hf:o/page:Q8_0", "is not a usable GGUF: it does not begin with GGUF"),
        ("hf:o/nowhere:Q8_0", "no such repository, or shows it to its members alone"),
        ("hf:o/gated:Q8_0", r"is gated \(401\): accept its terms on .*, and set llamaherd_model_hf_token"),
        ("hf:nothing", "is not hf:owner/repo"),
        ("/nowhere/m.gguf", "/nowhere/m.gguf is not there on this machine"),
    ],
)
def test_what_cannot_be_found_is_one_line(published_model: ModuleType, hub: Hub, model: str, expected: str) -> None:
    with pytest.raises(published_model.HubError, match=expected) as caught:
        search(published_model, hub, model)
    assert "\n" not in str(caught.value)


def test_a_token_opens_a_gated_repository_and_goes_nowhere_else(published_model: ModuleType, hub: Hub) -> None:
    assert search(published_model, hub, "hf:o/gated:Q8_0", hub_token="hf_secret")["entry"]
    stored = [authorization for path, _range, authorization in hub.asked if "signature" in path]
    assert stored == [""]
    with pytest.raises(published_model.HubError, match="check llamaherd_model_hf_token") as caught:
        hub.files.pop("o/gated")
        search(published_model, hub, "hf:o/gated:Q8_0", hub_token="hf_wrong")
    assert "hf_wrong" not in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "waits"),
    [
        ({"Retry-After": "1"}, True),
        ({"RateLimit": '"api";r=0;t=1'}, True),
        ({"Retry-After": "900"}, False),
        ({}, False),
    ],
)
def test_a_limit_of_requests_is_waited_for_or_told(
    published_model: ModuleType, hub: Hub, headers: dict[str, str], waits: bool
) -> None:
    hub.limited = [headers]
    if waits:
        assert search(published_model, hub, "hf:o/small-GGUF:Q8_0")["entry"]
        return
    with pytest.raises(published_model.HubError, match=r"limits requests \(429\): try again in (900 s|some minutes)"):
        search(published_model, hub, "hf:o/small-GGUF:Q8_0")
    assert len(hub.asked) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_no_more_of_a_file_is_fetched_than_its_header(published_model: ModuleType, hub: Hub, ranges: bool) -> None:
    hub.ranges = ranges
    found = search(published_model, hub, "hf:o/large:Q8_0")
    assert found["choices"][0]["bytes"] == len(LARGE)
    assert found["shape"]["kv_heads"] == [2, 2]
    if ranges:
        assert hub.sent < 10 << 20
        assert next(span for path, span, _ in hub.asked if "signature" in path) == "bytes=0-1048575"


def test_a_header_without_end_is_not_followed(
    published_model: ModuleType, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files["o/large"] = {"m-Q8_0.gguf": file(text("k") + struct.pack("<IIQ", 9, 8, 1 << 40), 1) + bytes(8 << 20)}
    with pytest.raises(published_model.HubError, match="is not a usable GGUF"):
        search(published_model, hub, "hf:o/large:Q8_0")
    hub.files["o/large"] = {"m-Q8_0.gguf": LARGE}
    clock = published_model.Hub.listing.__globals__["time"]
    monkeypatch.setattr(clock, "monotonic", iter(range(0, 10**6, 100)).__next__)
    with pytest.raises(published_model.HubError, match="did not arrive within 120 s"):
        search(published_model, hub, "hf:o/large:Q8_0")


def test_a_mirror_that_is_no_hub_is_named(published_model: ModuleType, hub: Hub) -> None:
    hub.page = b"<html>"
    with pytest.raises(published_model.HubError, match=r"is not a hub's API .*: check llamaherd_model_hf_url"):
        search(published_model, hub, "hf:o/small-GGUF")
    hub.url = "http://127.0.0.1:9"
    with pytest.raises(published_model.HubError, match=r"127.0.0.1:9 cannot be reached"):
        search(published_model, hub, "hf:o/small-GGUF")


def test_an_address_needs_its_sha256(published_model: ModuleType, hub: Hub) -> None:
    url = f"{hub.storage}/o/small-GGUF/small-Q8_0.gguf"
    with pytest.raises(published_model.HubError, match="give it with -e model_sha256"):
        search(published_model, hub, url)
    found = search(published_model, hub, url, sha256=["a" * 64])
    assert found["entry"] == {"name": "small-q8_0", "sha256": "a" * 64, "source": {"kind": "https", "url": url}}
    assert found["choices"][0]["bytes"] == len(SMALL + 2 * WEIGHTS)


def test_a_file_of_this_machine(published_model: ModuleType, hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "My Model.gguf"
    path.write_bytes(SMALL)
    entry = search(published_model, hub, str(path))["entry"]
    digest = hashlib.sha256(SMALL).hexdigest()
    assert entry == {"name": "my-model", "sha256": digest, "source": {"kind": "file", "path": str(path)}}
