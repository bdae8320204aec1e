"""The filters: what a release's name depends on, and TOML as a TOML parser reads it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd_server.config.engine_settings import merge
from llamaherd_server.wire.engine_settings import EngineSettings, Placement


def test_a_trees_hash_follows_names_and_contents_alone(filters: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package/a.py").write_text("a")
    first = filters.tree_hash(str(tmp_path))
    (tmp_path / "package/__pycache__").mkdir()
    (tmp_path / "package/__pycache__/a.pyc").write_text("compiled")
    (tmp_path / ".hidden").write_text("an editor's")
    assert filters.tree_hash(str(tmp_path)) == first
    (tmp_path / "package/a.py").rename(tmp_path / "package/b.py")
    second = filters.tree_hash(str(tmp_path))
    (tmp_path / "package/b.py").write_text("b")
    assert len({first, second, filters.tree_hash(str(tmp_path))}) == 3


@given(st.text(st.characters(codec="utf-8")), st.integers(-(2**63), 2**63 - 1), st.booleans())
def test_toml_reads_back(filters: ModuleType, text: str, number: int, flag: bool) -> None:
    table = {"text": text, "number": number, "flag": flag}
    assert tomllib.loads(filters.to_toml(table)) == table


def host(driver: str, toolkit: str, *architectures: str) -> dict[str, object]:
    gpus = [{"architecture": one, "driver": "570.86.15"} for one in architectures]
    return {"gpus": gpus, "cuda": {"driver": driver, "toolkit": toolkit, "complaint": ""}}


@pytest.mark.parametrize(
    ("facts", "architectures", "expected"),
    [
        pytest.param(host("12.8", "12.4", "90"), "native", [], id="all well"),
        pytest.param(host("12.8", "", "90"), "native", [], id="a toolkit is yet to be installed"),
        pytest.param(host("12.2", "12.8", "120"), "native", [], id="a newer toolkit of the driver's major version"),
        pytest.param(host("", "12.4"), "native", ["no driver"], id="no driver"),
        pytest.param(
            host("12.8", "13.0", "90"), "native", ["driver 570.86.15 runs CUDA 12.8 at most"], id="old driver"
        ),
        pytest.param(
            host("12.4", "11.5", "89", "89"), "native", ["89 needs a toolkit of 11.8"], id="Ubuntu 22.04's nvcc"
        ),
        pytest.param(
            host("13.0", "13.0", "70"), "native", ["70 needs a toolkit older than 13"], id="dropped by CUDA 13"
        ),
        pytest.param(
            host("12.8", "12.4", "90"), "90a-real;120a-real", ["120a-real needs a toolkit of 12.8"], id="listed"
        ),
    ],
)
def test_driver_toolkit_and_gpus_go_together(
    filters: ModuleType, facts: dict[str, object], architectures: str, expected: list[str]
) -> None:
    found = filters.cuda_mistakes(facts, architectures)
    assert len(found) == len(expected)
    assert all(part in line for part, line in zip(expected, found, strict=True))


PLACEMENT = msgspec.to_builtins(Placement())
INTEGERS = st.integers(-1, 600) | st.sampled_from([2**30, 2**31 - 1, 2**31])


@given(
    st.fixed_dictionaries(
        {
            **dict.fromkeys(["parallel", "batch", "ubatch", "ctx_per_slot", "kv_cells"], INTEGERS),
            **dict.fromkeys(["threads", "threads_batch", "speculative_depth"], INTEGERS),
            "flash_attention": st.sampled_from(["auto", "on", "off"]),
            "kv_type_v": st.sampled_from(["f16", "q8_0"]),
        }
    )
)
def test_settings_are_refused_before_a_deploy_as_the_server_would(
    filters: ModuleType, settings: dict[str, Any]
) -> None:
    served = [{"name": "m", "settings": settings, "placement": PLACEMENT}]
    try:
        merge(EngineSettings(), settings)
        refused = ""
    except ValueError as error:
        refused = str(error)
    found = filters.setting_mistakes(served, [])
    assert bool(found) == bool(refused)
    assert not found or refused.partition(":")[0].replace('"', "") in [
        one.removeprefix("model m: ").partition(":")[0] for one in found
    ]


@given(
    st.fixed_dictionaries(
        {
            **dict.fromkeys(["cpu_moe_layers", "main_gpu"], INTEGERS),
            "gpu_layers": INTEGERS | st.sampled_from(["auto", "many"]),
            "split_mode": st.sampled_from(["none", "layer", "row", "tensor"]),
            "devices": st.lists(st.sampled_from(["CUDA0", "Vulkan1"]), max_size=2),
            "tensor_split": st.lists(st.floats(-1, 4), max_size=3),
        }
    )
)
def test_a_placement_is_refused_before_a_deploy_as_the_server_would(
    filters: ModuleType, placement: dict[str, Any]
) -> None:
    try:
        merge(Placement(), placement)
        refused = False
    except ValueError:
        refused = True
    whole = {**PLACEMENT, **placement}
    served = [{"name": "m", "settings": msgspec.to_builtins(EngineSettings()), "placement": whole}]
    assert bool(filters.setting_mistakes(served, [])) == refused


def test_an_instances_own_settings_are_held_to_the_same(filters: ModuleType) -> None:
    served = [{"name": "m", "settings": msgspec.to_builtins(EngineSettings()), "placement": PLACEMENT}]
    instances = [
        {"unit": "llamaherd-server", "settings": {}},
        {"unit": "llamaherd-server-two", "settings": {"batch": 8}},
    ]
    [found] = filters.setting_mistakes(served, instances)
    assert found.startswith("llamaherd-server-two: ubatch 512 is larger than batch 8")


def test_the_log_tells_how_many_layers_are_on_a_gpu(filters: ModuleType) -> None:
    assert filters.gpu_layers("load_tensors: offloaded 31/31 layers to GPU\nready") == 31
    assert filters.gpu_layers("load_tensors: offloaded 0/31 layers to GPU") == 0
    assert filters.gpu_layers("ready") == 0


def test_a_table_aligns_its_columns(filters: ModuleType) -> None:
    assert filters.table([["host", "slots"], ["gpu1.internal", 4]]) == ["host           slots", "gpu1.internal  4"]


AWAY = {"residence": "on_demand"}


def entry(name: str, **more: object) -> dict[str, object]:
    return {"name": name, "sha256": "0" * 64, "source": {"kind": "file", "path": "/m.gguf"}, **more}


SUMS = ["1" * 64, "2" * 64, "3" * 64]


def split_entry(sums: object, name: str = "a", number: int = 1) -> dict[str, object]:
    return entry(name, sha256=sums, source={"kind": "file", "path": f"/m-{number:05}-of-00003.gguf"})


def test_the_files_of_an_entry(model_filters: ModuleType) -> None:
    [whole] = model_filters.model_parts(entry("a"))
    assert whole == {"file": f"{'0' * 64}.gguf", "sha256": "0" * 64, "from": "/m.gguf"}
    source = {"kind": "hf", "repo": "o/n", "file": "q/m-00001-of-00003.gguf", "revision": "abc"}
    model = {"name": "a", "sha256": SUMS, "source": source}
    parts = model_filters.model_parts(model, "https://hub")
    assert [part["from"] for part in parts] == [
        f"https://hub/o/n/resolve/abc/q/m-0000{number}-of-00003.gguf" for number in (1, 2, 3)
    ]
    assert [part["sha256"] for part in parts] == SUMS
    digest = parts[0]["file"][:64]
    assert [part["file"] for part in parts] == [f"{digest}-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert digest not in SUMS
    assert model_filters.model_file(model, "1") == parts[0]["file"]
    assert model_filters.model_file(model | {"quantize": "Q4_0"}, "1") == f"{digest}.Q4_0-1.gguf"
    assert model_filters.model_parts(model, bundle="/b")[1]["from"] == f"/b/models/{parts[1]['file']}"


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        pytest.param([entry("a"), entry("b", aliases=["c"])], [], id="all well"),
        pytest.param([entry("a"), entry("b", aliases=["a"])], ["the name a is given to two"], id="a name twice"),
        pytest.param([entry("a", mmproj="p")], ["does not list its mmproj p"], id="mmproj"),
        pytest.param([entry("a", draft="d")], ["does not list its draft d"], id="draft"),
        pytest.param([entry("a", draft="b"), entry("b", sha256="x")], ["b: sha256 is 'x'"], id="a draft's sha256"),
        pytest.param([entry("a", memory_share=0)], ["a: memory_share is 0"], id="no memory"),
        pytest.param(
            [entry("a", memory_share=0.6), entry("b", memory_share=0.6)], ["ask for 1.2"], id="too much memory"
        ),
        pytest.param([entry("a", memory_share=1), entry("b")], ["nothing is left"], id="no memory left"),
        pytest.param(
            [entry("a"), entry("b", memory_share=0.6, **AWAY), entry("c", memory_share=0.6, **AWAY)], [], id="by turns"
        ),
        pytest.param([entry("a", memory_share=1), entry("b", **AWAY)], ["nothing is left"], id="no memory on demand"),
        pytest.param([entry("a", **AWAY)], ["a is llamaherd_model and cannot be on_demand"], id="first on demand"),
        pytest.param([entry("a"), entry("b", idle_s=0, **AWAY)], ["b: idle_s is 0"], id="never idle"),
        pytest.param([entry("a", sha256="x")], ["a: sha256 is 'x'"], id="no sha256"),
        pytest.param([entry("a", source={"kind": "hf", "repo": "o/n"})], ["kind hf needs file"], id="no file"),
        pytest.param([split_entry(SUMS)], [], id="a split model"),
        pytest.param([split_entry(SUMS[:2])], ["first of 3 parts, sha256 has 2"], id="a part missing"),
        pytest.param([split_entry([*SUMS[:2], SUMS[0]])], [f"{SUMS[0]} for two parts"], id="a part twice"),
        pytest.param([split_entry(SUMS[0])], ["first of 3 parts, sha256 has 1"], id="one sum for all parts"),
        pytest.param([split_entry(SUMS, number=2)], ["its first part, /m-00001-of-00003.gguf"], id="another part"),
        pytest.param([entry("a", sha256=SUMS)], ["ends in -00001-of-00003.gguf"], id="sums of parts that are none"),
        pytest.param(
            [entry("a", mmproj="b"), split_entry(SUMS, name="b")],
            ["b: a projector or LoRA is one file"],
            id="projector",
        ),
        pytest.param([entry("Qwen/Qwen3-8B:Q4 (ü)", aliases=["claude[1m]"])], [], id="a hub's name"),
        pytest.param([entry("a\nb")], [r"'a\nb' has '\n'"], id="a line's end"),
        pytest.param([entry('it\'s "a"')], ["has '\\'\"\"'"], id="quotes"),
        pytest.param([entry("x" * 260)], ["has 260 bytes: 200 are the most"], id="too long for a file"),
        pytest.param([entry(" a")], ["begins or ends with a space"], id="a space"),
        pytest.param([entry("0" * 64)], ["begins as a sha256"], id="a file in the store"),
        pytest.param([entry("a", aliases=["b\x1b"])], [r"alias 'b\x1b', which cannot be printed"], id="alias"),
    ],
)
def test_models_that_cannot_be_served(
    model_filters: ModuleType, entries: list[dict[str, object]], expected: list[str]
) -> None:
    found = model_filters.model_mistakes(entries, [one["name"] for one in entries])
    assert len(found) == len(expected)
    for line, part in zip(found, expected, strict=True):
        assert part in line


@pytest.mark.parametrize("names", [[], [""], ["a"]])
def test_an_empty_list_of_models_is_one_line(model_filters: ModuleType, names: list[str]) -> None:
    [found] = model_filters.model_mistakes([], names)
    assert found.startswith("llamaherd_models is empty: list")


def test_two_models_of_one_name(model_filters: ModuleType) -> None:
    assert model_filters.model_mistakes([entry("a"), entry("b"), entry("b")], ["a"]) == [
        "llamaherd_models lists 'b' twice: rename one"
    ]


@given(st.text("ab%/F2", min_size=1), st.text("ab%/F2", min_size=1))
def test_two_names_are_never_one_file(model_filters: ModuleType, one: str, other: str) -> None:
    names = [name.replace("%", "") for name in (one, other)]  # which no name has
    links = [model_filters.model_link(name, "/store") for name in names]
    assert (links[0] == links[1]) == (names[0] == names[1])
    assert all(Path(link).parent == Path("/store") for link in links)


def test_a_name_that_is_not_listed_is_told_with_those_that_are(model_filters: ModuleType) -> None:
    assert model_filters.model_mistakes([entry("a"), entry("b")], ["a", "nope"]) == [
        "model nope is to be served, but llamaherd_models does not list it; it has a, b"
    ]


def test_what_an_entry_leaves_out_is_shared(model_filters: ModuleType) -> None:
    models = [entry("a", settings={"parallel": 2}), entry("b", engine="llama-server", memory_share=0.5), entry("c")]
    shared = {"engine": "embedded", "settings": {"parallel": 4, "batch": 8}, "tuned": {"parallel": 3}}
    a, b, c = model_filters.served_models(models, ["a", "b", "c"], shared)
    assert [one["settings"]["parallel"] for one in (a, b, c)] == [3, 4, 4]
    assert [one["engine"] for one in (a, b, c)] == ["embedded", "llama-server", "embedded"]
    assert [one["memory_share"] for one in (a, b, c)] == [0.25, 0.5, 0.25]


@pytest.mark.parametrize(("loaded", "shares"), [(1, [0.5, 0.5, 0.5]), (2, [1 / 3] * 3), (9, [1 / 3] * 3)])
def test_models_on_demand_share_what_so_many_have(model_filters: ModuleType, loaded: int, shares: list[float]) -> None:
    shared = {"engine": "embedded", "settings": {}, "tuned": {}, "models_loaded": loaded}
    models = [entry("a"), entry("b", **AWAY), entry("c", **AWAY)]
    assert [one["memory_share"] for one in model_filters.served_models(models, ["a", "b", "c"], shared)] == shares


def test_a_tuned_engine_is_the_first_models_and_no_setting(model_filters: ModuleType) -> None:
    models = [entry("a", engine="embedded"), entry("b", extra_args=["-x"])]
    shared = {"engine": "embedded", "settings": {"parallel": 4}, "tuned": {"engine": "llama-server", "parallel": 3}}
    a, b = model_filters.served_models(models, ["a", "b"], shared)
    assert (a["engine"], a["settings"], b["engine"], b["settings"]) == (
        *("llama-server", {"parallel": 3}),
        *("embedded", {"parallel": 4}),
    )
    [mistake] = model_filters.engine_mistakes([a, b])
    assert "b: extra_args needs the engine llama-server" in mistake
    assert "a: mmproj needs" in model_filters.engine_mistakes([a | {"engine": "embedded", "mmproj": "p"}])[0]
    drafts, head = {"settings": {"speculative": "draft"}}, {"settings": {"speculative": "mtp"}}
    b |= {"extra_args": []}
    assert model_filters.engine_mistakes([a | drafts | {"draft": "d"}, b | head, b | drafts | {"draft": "d"}]) == []
    for model in a, b:
        assert "speculative draft needs draft, the entry" in model_filters.engine_mistakes([model | drafts])[0]


def test_instances_that_cannot_run_beside_each_other(filters: ModuleType) -> None:
    first, second = filters.server_instances([{"name": "gpu1", "port": 8081, "devices": "1"}], {"port": 8080})
    assert (first["unit"], first["settings"], first["devices"]) == ("llamaherd-server", {}, "")
    assert (second["unit"], second["devices"]) == ("llamaherd-server-gpu1", "1")
    assert filters.instance_mistakes([first, second]) == []
    both = filters.server_instances([{"name": "a b", "port": 8080}, {"name": "a b", "port": 9}], {"port": 8080})
    name, again, unit, port = filters.instance_mistakes(both)
    assert "'a b'" in name
    assert again == name
    assert "unit llamaherd-server-a b" in unit
    assert "port 8080" in port
