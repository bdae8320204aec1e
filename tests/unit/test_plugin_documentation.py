"""ansible-doc shows every plugin, with examples, return values and the arguments that the plugin takes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.unit.conftest import ROOT

ANSIBLE_DOC = str(Path(sys.executable).parent / "ansible-doc")
PREFIX = "llamaherd.llamaherd"


def documented(kind: str, names: set[str]) -> dict[str, Any]:
    """The documentation of all plugins of a kind by their short names; fails on a warning, as ansible-test does."""
    command = [ANSIBLE_DOC, "--json", "--type", kind, *(f"{PREFIX}.{name}" for name in sorted(names))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return {name.removeprefix(f"{PREFIX}."): page for name, page in json.loads(done.stdout).items()}


def assert_complete(pages: dict[str, Any], names: set[str]) -> None:
    assert set(pages) == names
    for name, page in pages.items():
        assert page["doc"]["short_description"], name
        assert page["doc"]["description"], name
        assert page["examples"], name
        assert page["return"], name


def valid_args(path: Path) -> set[str]:
    """What an action plugin's _VALID_ARGS lists."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_VALID_ARGS":
            return set(ast.literal_eval(ast.unparse(node.value).removeprefix("frozenset(").removesuffix(")")))
    return set()


def test_ansible_doc_shows_every_module_and_action() -> None:
    actions = {path.stem: path for path in ROOT.glob("plugins/action/*.py")}
    names = actions.keys() | {path.stem for path in ROOT.glob("plugins/modules/*.py")}
    pages = documented("module", names)
    assert_complete(pages, names)
    options = {name: set(pages[name]["doc"].get("options", {})) for name in actions}
    assert options == {name: valid_args(path) for name, path in actions.items()}


def test_ansible_doc_shows_every_filter(
    filters: ModuleType,
    model_filters: ModuleType,
    published_filters: ModuleType,
    llama_server_filters: ModuleType,
    certificate_filters: ModuleType,
    packages: ModuleType,
    route_filters: ModuleType,
    traffic_filters: ModuleType,
    usage_filters: ModuleType,
) -> None:
    others = (llama_server_filters, certificate_filters, packages, route_filters, traffic_filters, usage_filters)
    files = (filters, model_filters, published_filters, *others)
    assert len(files) == len(list(ROOT.glob("plugins/filter/*.py")))
    named = {name: filter_ for module in files for name, filter_ in module.FilterModule().filters().items()}
    pages = documented("filter", set(named))
    assert_complete(pages, set(named))
    for name, filter_ in named.items():
        code = filter_.__code__
        arguments = code.co_varnames[1 : code.co_argcount]
        assert pages[name]["doc"].get("positional", "") == ", ".join(arguments), name
        assert set(pages[name]["doc"]["options"]) == {"_input", *arguments}, name
