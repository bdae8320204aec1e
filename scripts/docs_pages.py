"""Generates the pages of the site that describe variables, metrics and the API, so that they match the code.

A mkdocs hook: https://www.mkdocs.org/user-guide/configuration/#hooks
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from fastapi import FastAPI
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from llamaherd_server.app import create_app
from llamaherd_server.config.settings import Settings
from llamaherd_server.engine.base import Engine, EngineStatus
from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.protocol import Stats

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files in docs/."""
    pages = {"variables.md": variables(), "metrics.md": metrics(), "api.md": api()}
    pages |= {page: beside(name) for name, page in ROOT_PAGES.items()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def beside(name: str) -> str:
    """Return a page of the repository's root with its links changed to those of the site."""
    text = re.sub(r"\]\(docs/", "](", (ROOT / name).read_text())
    return re.sub(r"\]\(([A-Z]+\.md)\)", lambda link: f"]({ROOT_PAGES[link[1]]})", text)


def variables() -> str:
    """Return the page of all variables of all roles, from the argument_specs that plays check inventories with."""
    lines = [
        "# Variables",
        "",
        "Variables that an inventory can set. Each play checks names and types before it changes anything.",
        "",
    ]
    for path in sorted(ROOT.glob("roles/*/meta/argument_specs.yml"), key=lambda one: (one.parts[-3] != "common", one)):
        role = path.parts[-3]
        for entry in yaml.safe_load(path.read_text())["argument_specs"].values():
            options = {
                name: option for name, option in entry.get("options", {}).items() if name.startswith("llamaherd_")
            }
            if options:
                title = "All roles" if role == "common" else f"`{role}`"
                lines += [f"## {title}", "", f"{sentence(entry['short_description'])}", "", *table(options), ""]
    return "\n".join(lines)


def table(options: dict[str, Any]) -> Iterator[str]:
    """Yield a Markdown table of argument_specs options. Those of a dictionary follow it, named by their path."""
    yield "| name | type | default | what it is |"
    yield "| --- | --- | --- | --- |"
    yield from rows("", options)


def rows(prefix: str, options: dict[str, Any]) -> Iterator[str]:
    """Yield a table row for each option."""
    for name, option in options.items():
        kind = option.get("type", "str")
        if "elements" in option:
            kind += f" of {option['elements']}"
        if "choices" in option:
            kind = " \\| ".join(f"`{choice}`" for choice in option["choices"])
        default = "required" if option.get("required") else code(option["default"]) if "default" in option else ""
        yield f"| `{prefix}{name}` | {kind} | {default} | {sentence(option.get('description', ''))} |"
        inner = prefix + name + ("[]." if option.get("type") == "list" else ".")
        yield from rows(inner, option.get("options", {}))


def code(value: object) -> str:
    """Format a default as YAML for a table cell."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
    return f"`{text}`".replace("|", "\\|")


class _Engine:
    """The part of an engine that metrics and routes use before the first request."""

    def observe(self, listener: object) -> None:
        """Do nothing: this engine has no events."""

    def status(self) -> EngineStatus:
        numbers = dict.fromkeys(Stats.__struct_fields__, 0)
        return EngineStatus("embedded", "ready", None, EngineSettings(), Stats(**numbers), 0.0, 0, 0.0, None, None)


def metrics() -> str:
    """Return the page of all metrics, as the server registers and describes them."""
    lines = [
        "# Metrics",
        "",
        "Metrics of `/metrics`, in Prometheus' text format. Names with `llamacpp:` are llama-server's own.",
        "",
    ]
    lines += ["| name | type | what it is |", "| --- | --- | --- |"]
    registry = application().state.llamaherd.serving.metrics.registry
    for family in registry.collect():
        suffix = "_total" if family.type == "counter" else ""
        lines.append(f"| `{family.name}{suffix}` | {family.type} | {sentence(family.documentation)} |")
    return "\n".join(lines)


def api() -> str:
    """Return the page of all routes with their fields, from the OpenAPI document."""
    document = application().openapi()
    lines = [
        "# API",
        "",
        "The same as `/docs` of a running server. Unknown fields are errors that name the nearest one.",
        "",
    ]
    for path, methods in sorted(document["paths"].items()):
        for method, operation in methods.items():
            lines += [f"## {method.upper()} {path}", "", operation.get("description", ""), ""]
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
            if fields := document["components"]["schemas"].get(name, {}).get("properties"):
                lines += ["| field | what the server does with it |", "| --- | --- |"]
                lines += [
                    f"| `{field}` | {sentence(schema.get('description', ''))} |" for field, schema in fields.items()
                ]
                lines.append("")
    return "\n".join(lines)


@functools.cache
def application() -> FastAPI:
    """Return the server's app with all optional parts and an engine that computes nothing."""
    telemetry = {"otlp_endpoint": "http://localhost:4318"}
    settings = Settings.model_validate({"model": {"name": "model", "path": ROOT / "README.md"}, "telemetry": telemetry})
    return create_app(settings, lambda _: cast(Engine, _Engine()))


def sentence(text: str | list[str]) -> str:
    """Return a description with C(code) converted to Markdown."""
    text = " ".join(text) if isinstance(text, list) else text
    return re.sub(r"C\(([^)]*)\)", r"`\1`", text).replace("|", "\\|")
