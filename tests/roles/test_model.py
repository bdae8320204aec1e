"""The store: what settings name is in it, whatever the models are called; on this machine's disk, without a service."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml

from tests.roles.conftest import play
from tests.unit.test_gguf import SMALL, file, text

Entry = Callable[..., dict[str, Any]]
Bring = Callable[..., CompletedProcess[str]]
SMALLEST = {"parallel": 1, "ctx_per_slot": 256, "batch": 1, "ubatch": 1}


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    """entry(name, content, more keys): a GGUF file on the controller as an inventory lists it."""

    def listed(name: str, content: str, **more: Any) -> dict[str, Any]:
        path = tmp_path / f"{content[:8]}.gguf"
        path.write_bytes(SMALL + content.encode())
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return {"name": name, "sha256": sha256, "source": {"kind": "file", "path": str(path)}, **more}

    return listed


@pytest.fixture
def bring(tmp_path: Path) -> Bring:
    """bring(models, arguments): the role over tmp_path/state; `tasks` are run instead of it."""

    def run(models: list[dict[str, Any]], *arguments: str, tasks: Any = None) -> CompletedProcess[str]:
        variables = {
            "llamaherd_models": models,
            "llamaherd_more_models": [model["name"] for model in models[1:]],
            "llamaherd_settings": SMALLEST,
            "llamaherd_state_dir": str(tmp_path / "state"),
            "llamaherd_config_dir": str(tmp_path / "config"),
            "llamaherd_service_manager": "none",
            "llamaherd_python": sys.executable,
            "ansible_python_interpreter": sys.executable,
        }
        (tmp_path / "variables.json").write_text(json.dumps(variables))
        playbook = tmp_path / "model.yml"
        roles = [{"role": "common" if tasks else "model", "tags": ["model"]}]
        one = {"hosts": "inference", "gather_facts": False, "roles": roles, "tasks": tasks or []}
        playbook.write_text(yaml.safe_dump([one]))
        inventory = tmp_path / "hosts.yml"
        local = {"localhost": {"ansible_connection": "local"}}
        inventory.write_text(yaml.safe_dump({"inference": {"hosts": local}}))
        extra = f"@{tmp_path / 'variables.json'}"
        return play(tmp_path, "-i", str(inventory), str(playbook), "-e", extra, *arguments)

    return run


def store(tmp_path: Path) -> dict[str, str]:
    """Each file in the store with what it says at its end; of a link, what it leads to."""
    found = (tmp_path / "state/models").iterdir()
    return {path.name: path.read_bytes().removeprefix(SMALL).decode() for path in found if not path.is_dir()}


def test_loras_of_all_models_are_there_also_under_one_name(tmp_path: Path, entry: Entry, bring: Bring) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    loras = [entry("tone", text) for text in ("first", "second", "third")]
    models = [entry("a", "a", lora=[loras[0]]), entry("b", "b", lora=loras[1:], chat_template=str(template))]
    run = bring(models)
    assert run.returncode == 0, run.stdout + run.stderr
    found = store(tmp_path)
    assert {found[f"{lora['sha256']}.gguf"] for lora in loras} == {"first", "second", "third"}
    assert (found["a.gguf"], found["b.gguf"]) == ("a", "b")
    assert found[f"{hashlib.sha256(template.read_bytes()).hexdigest()[:12]}.jinja"] == "{{ messages }}"
    assert "changed=0" in bring(models).stdout


def test_what_settings_name_comes_with_the_settings_alone(tmp_path: Path, entry: Entry, bring: Bring) -> None:
    assert bring([entry("a", "a"), entry("b", "b")]).returncode == 0
    lora = entry("tone", "lora")
    run = bring([entry("a", "a"), entry("b", "b", lora=[lora])], "--tags", "config")
    assert run.returncode == 0, run.stdout + run.stderr
    assert store(tmp_path)[f"{lora['sha256']}.gguf"] == "lora"


def test_files_that_settings_refer_to_stay_until_they_do_no_more(tmp_path: Path, entry: Entry, bring: Bring) -> None:
    loras = [entry("tone", text) for text in ("one", "two")]
    assert bring([entry("a", "a", lora=loras)]).returncode == 0
    (tmp_path / "config").mkdir()
    (tmp_path / "config/server.toml").write_text("".join(f'path = "/x/{lora["sha256"]}.gguf"\n' for lora in loras))
    assert bring([entry("a", "b")]).returncode == 0
    assert {"one", "two"} <= set(store(tmp_path).values()), "the server would not start again"
    (tmp_path / "config/server.toml").write_text("")
    assert bring([entry("a", "c")]).returncode == 0
    assert not {"one", "two"} & set(store(tmp_path).values())


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-8B-GGUF:Q4_K_M", "größe 7 (alt)", "é" * 100], ids=["hub", "words", "long"]
)
def test_names_as_clients_use_them(tmp_path: Path, entry: Entry, bring: Bring, name: str) -> None:
    run = bring([entry(name, "a")])
    assert run.returncode == 0, run.stdout + run.stderr
    assert store(tmp_path)[f"{name.replace('/', '%2F')}.gguf"] == "a"
    assert "changed=0" in bring([entry(name, "a")]).stdout


def test_what_was_cut_off_is_resumed(tmp_path: Path, entry: Entry, bring: Bring) -> None:
    model = entry("a", "a" * 1000)
    partial = tmp_path / f"state/models/{model['sha256']}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes((SMALL + b"a" * 1000)[:-500])
    run = bring([model], "-v")
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"resumed: {len(SMALL) + 500}" in run.stdout
    assert store(tmp_path)["a.gguf"] == "a" * 1000
    other = entry("b", "b")
    (tmp_path / f"state/models/{other['sha256']}.partial").write_bytes(b"x")
    failed = bring([other])
    assert "sha256 mismatch" in failed.stderr + failed.stdout
    assert bring([other]).returncode == 0, "from its beginning"


def part(number: int, count: int) -> bytes:
    """What llama-gguf-split writes: all keys in the first part, in each its own number and how many there are."""
    keys = text("split.no") + struct.pack("<IH", 2, number) + text("split.count") + struct.pack("<IH", 2, count)
    keys += text("split.tensors.count") + struct.pack("<Ii", 5, 0)
    return file(SMALL[24:] + keys, 10) if number == 0 else file(keys, 3)


@pytest.fixture
def split_entry(tmp_path: Path) -> Entry:
    """split_entry(name, numbers): parts of these numbers on the controller as an inventory lists them."""

    def listed(name: str, numbers: tuple[int, ...] = (0, 1, 2), content: str = "") -> dict[str, Any]:
        sums = []
        for place, number in enumerate(numbers, 1):
            path = tmp_path / f"{name}-{place:05}-of-{len(numbers):05}.gguf"
            path.write_bytes(part(number, 3) + content.encode() * place)
            sums.append(hashlib.sha256(path.read_bytes()).hexdigest())
        source = {"kind": "file", "path": str(tmp_path / f"{name}-00001-of-{len(numbers):05}.gguf")}
        return {"name": name, "sha256": sums, "source": source}

    return listed


def test_a_split_model_has_all_its_parts_beside_the_first(
    tmp_path: Path, split_entry: Entry, entry: Entry, bring: Bring
) -> None:
    run = bring([split_entry("a")])
    assert run.returncode == 0, run.stdout + run.stderr
    models = tmp_path / "state/models"
    first = (models / "a.gguf").resolve()
    stored = sorted(path for path in models.iterdir() if path.is_file() and not path.is_symlink())
    assert stored[0] == first
    assert [path.name[64:] for path in stored] == [f"-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert [path.read_bytes() for path in stored] == [part(number, 3) for number in range(3)]
    assert "changed=0" in bring([split_entry("a")]).stdout
    stored[1].unlink()
    again = bring([split_entry("a")], "-v")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"size: {len(part(1, 3))}" in again.stdout, "the missing part alone is sent again"
    # Parts go together: the one model that is kept is the latest, whole; then another takes its place.
    assert bring([split_entry("a", content="b")]).returncode == 0
    kept = {path.name for path in models.iterdir()}
    assert {path.name for path in stored} < kept
    assert bring([entry("a", "c")]).returncode == 0
    assert not {path.name for path in stored} & {path.name for path in models.iterdir()}
    assert len(list(models.glob("*-of-00003.gguf"))) == 3


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((0, 2, 1), "part 2 of 3 has split.no 2"),
        ((0, 1), "part 1 of 2 has split.no 0 and split.count 3"),
        ((0,), "part 1 of 1 has split.no 0 and split.count 3"),
    ],
    ids=["swapped", "too few", "alone"],
)
def test_parts_of_no_model_are_one_line(
    tmp_path: Path, split_entry: Entry, bring: Bring, numbers: tuple[int, ...], expected: str
) -> None:
    run = bring([split_entry("a", numbers)])
    assert run.returncode != 0
    assert expected in run.stdout + run.stderr
    assert not (tmp_path / "state/models/a.gguf").exists()


def test_a_part_that_the_controller_lacks_is_named(tmp_path: Path, split_entry: Entry, bring: Bring) -> None:
    model = split_entry("a")
    (tmp_path / "a-00002-of-00003.gguf").unlink()
    run = bring([model])
    assert run.returncode != 0
    assert f"{tmp_path}/a-00002-of-00003.gguf is not there on this machine" in run.stdout + run.stderr


def test_a_bundle_holds_all_parts(tmp_path: Path, split_entry: Entry, bring: Bring) -> None:
    model, bundle = split_entry("a"), tmp_path / "bundle"
    variables = {"_bundle_work": str(tmp_path / "state"), "_bundle_folder": str(bundle), "_bundle_model": model}
    pack = {"name": "Pack the model", "include_role": {"name": "bundle", "tasks_from": "model"}, "vars": variables}
    (bundle / "models").mkdir(parents=True)
    run = bring([model], tasks=[pack])
    assert run.returncode == 0, run.stdout + run.stderr
    packed = sorted(path.read_bytes() for path in (bundle / "models").iterdir())
    assert packed == sorted(part(number, 3) for number in range(3))
    for source in tmp_path.glob("a-*.gguf"):
        source.unlink()
    run = bring([model], "-e", f"llamaherd_bundle={bundle}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "state/models/a.gguf").read_bytes() == part(0, 3)
