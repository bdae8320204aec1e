"""Where a published model's entry goes in an inventory: nothing that an operator wrote is lost or written anew."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ENTRY = {
    "name": "chat",
    "sha256": "a" * 64,
    "source": {"kind": "hf", "repo": "o/n", "file": "m-Q4_K_M.gguf", "revision": "0" * 40},
}
INVENTORY = """\
# Ours.
llamaherd_settings: {parallel: 4}   # measured

llamaherd_models:
  - name: code          # the team's
    sha256: "1111111111111111111111111111111111111111111111111111111111111111"
    source: {kind: https, url: https://models.internal/code.gguf}
  - name: chat
    # Asked of by everybody.
    sha256: "2222222222222222222222222222222222222222222222222222222222222222"
    source:
      kind: hf
      repo: o/n
      file: old.gguf
    settings: {ctx_per_slot: 8192}   # long
    aliases: ["*"]

# The token is in a vault.
llamaherd_model_hf_token: !vault |
  $ANSIBLE_VAULT;1.1;AES256
  6162
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hosts.yml").write_text("inference: {hosts: {h1: null}}\n")
    (tmp_path / "group_vars").mkdir()
    return tmp_path


def listing(published_filters: ModuleType, folder: Path, entry: dict[str, Any] = ENTRY) -> dict[str, Any]:
    """What the filter returns, after it was written."""
    found: dict[str, Any] = published_filters.model_listing(entry, str(folder), str(folder / "hosts.yml"))
    if found["path"]:
        Path(found["path"]).parent.mkdir(exist_ok=True)
        Path(found["path"]).write_text(found["content"])
        again = published_filters.model_listing(entry, str(folder), str(folder / "hosts.yml"))
        assert again["content"] == found["content"]
    return found


def test_an_inventory_without_models_gets_a_file_of_its_own(published_filters: ModuleType, folder: Path) -> None:
    found = listing(published_filters, folder)
    assert found["path"] == str(folder / "group_vars/all/models.yml")
    assert yaml.safe_load(found["content"]) == {"llamaherd_models": [ENTRY]}
    several = ENTRY | {"name": "big", "sha256": ["b" * 64, "1" * 64]}
    found = listing(published_filters, folder, several)
    assert yaml.safe_load(found["content"]) == {"llamaherd_models": [ENTRY, several]}


def test_a_file_that_ansible_would_then_leave_out_is_added_to(published_filters: ModuleType, folder: Path) -> None:
    """With a folder group_vars/all beside it, Ansible reads all.yml no more."""
    path = folder / "group_vars/all.yml"
    path.write_text("# Ours.\nllamaherd_engine: embedded\n")
    found = listing(published_filters, folder)
    assert found["path"] == str(path)
    assert found["content"].startswith("# Ours.\nllamaherd_engine: embedded\n\nllamaherd_models:\n")
    assert yaml.safe_load(found["content"])["llamaherd_models"] == [ENTRY]


def test_of_an_entry_of_the_name_source_and_sum_alone_change(published_filters: ModuleType, folder: Path) -> None:
    path = folder / "group_vars/all.yml"
    path.write_text(INVENTORY)
    found = listing(published_filters, folder)
    old = INVENTORY[INVENTORY.index("kind: hf") : INVENTORY.index("    settings: {ctx")].rstrip("\n")
    new = f"{{kind: hf, repo: o/n, file: m-Q4_K_M.gguf, revision: '{'0' * 40}'}}"
    expected = INVENTORY.replace(f'"{"2" * 64}"', "a" * 64).replace(old, new)
    assert found["content"] == expected


def test_another_entry_comes_after_the_last(published_filters: ModuleType, folder: Path) -> None:
    path = folder / "group_vars/all.yml"
    path.write_text(INVENTORY)
    found = listing(published_filters, folder, ENTRY | {"name": "new"})
    before, _mark, after = INVENTORY.partition('    aliases: ["*"]\n')
    assert found["content"].startswith(
        f'{before}    aliases: ["*"]\n  - name: new\n    sha256: {"a" * 64}\n    source: {{'
    )
    assert found["content"].endswith(after)


def test_models_within_the_inventory_itself(published_filters: ModuleType, folder: Path) -> None:
    text = "inference:\n  hosts: {h1: null}\n  vars:\n    llamaherd_models:\n    - {name: a, sha256: b, source: {}}\n"
    (folder / "hosts.yml").write_text(text)
    found = listing(published_filters, folder)
    assert found["content"].startswith(text)
    assert yaml.safe_load(found["content"])["inference"]["vars"]["llamaherd_models"][1] == ENTRY


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("llamaherd_models: [{name: a, sha256: b, source: {}}]\n", "between brackets"),
        ("llamaherd_models: '{{ ours }}'\n", "not as a list"),
        ("llamaherd_models:\n- name: chat\n  sha256:\n  - a  # one\n  - b\n  source: {}\n", "comments or anchors"),
        ("x: &x {}\nllamaherd_models:\n- name: chat\n  sha256: a\n  source: *x\n", "anchors|would change"),
    ],
)
def test_what_cannot_be_changed_without_harm_is_printed(
    published_filters: ModuleType, folder: Path, text: str, expected: str
) -> None:
    (folder / "group_vars/all.yml").write_text(text)
    found = listing(published_filters, folder)
    assert found["path"] == ""
    assert any(word in found["reason"] for word in expected.split("|"))
    assert yaml.safe_load("\n".join(found["lines"])) == {"llamaherd_models": [ENTRY]}


def test_models_in_several_files_are_printed(published_filters: ModuleType, folder: Path) -> None:
    (folder / "host_vars/h1").mkdir(parents=True)
    for path in (folder / "group_vars/all.yml", folder / "host_vars/h1/models.yml"):
        path.write_text("llamaherd_models: []\n")
    found = listing(published_filters, folder)
    assert found["path"] == ""
    assert "all.yml and in" in found["reason"]


def test_an_empty_list_is_filled(published_filters: ModuleType, folder: Path) -> None:
    (folder / "group_vars/all.yml").write_text("llamaherd_models: []  # none yet\nx: 1\n")
    found = listing(published_filters, folder)
    assert yaml.safe_load(found["content"]) == {"llamaherd_models": [ENTRY], "x": 1}
    assert "# none yet" in found["content"]


def test_a_row_for_each_choice_by_the_one_arithmetic(published_filters: ModuleType, gguf: ModuleType) -> None:
    keys = {"block_count": 2, "attention.head_count": 4, "embedding_length": 64, "context_length": 4096}
    shape = gguf.shape({"general.architecture": "llama", **{f"llama.{name}": value for name, value in keys.items()}})
    choices = [
        {"quantization": name, "file": f"{name}.gguf", "missing": [], "bytes": size}
        for name, size in {"Q4_0": 1 << 20, "Q6_K": 3 << 20, "Q8_0": 8 << 20}.items()
    ]
    settings = {"parallel": 4, "ctx_per_slot": 2048, "ubatch": 1}
    context = gguf.kv_bytes(shape, gguf.DEFAULTS | settings) + gguf.compute_bytes(shape, gguf.DEFAULTS | settings)
    memory = (1 << 20) + int(context) + 1
    found = {"choices": choices, "shape": vars(shape)}
    head, small, middle, large = published_filters.model_fits(found, settings, memory, 4 << 20)
    assert head[-1] == "fits"
    assert (small[0], small[-1], int(small[5])) == ("Q4_0", "yes", 2048)
    assert middle[-1] == "with less context"
    assert 0 < int(middle[5]) < 2048
    decided = published_filters.model_fits(found, settings | {"ctx_per_slot": 0}, 2 * memory, 4 << 20)[1]
    assert (decided[4], decided[-1]) == ("4096", "yes")
    assert large[-1] == "no, but not on the disk, where 0.00 GiB are left"
