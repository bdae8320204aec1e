"""Makes the plugins and the role files importable as the modules that they are on a host."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path: str, name: str) -> ModuleType:
    """The Python file at `path` (from the repository's root) as module `name`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


UTILS = "ansible_collections.llamaherd.llamaherd.plugins.module_utils"


def util(name: str) -> ModuleType:
    """The file of module_utils, also as what `from … import` takes out of the package."""
    package = sys.modules.setdefault(UTILS, ModuleType(UTILS))
    module = load(f"plugins/module_utils/{name}.py", f"{UTILS}.{name}")
    setattr(package, name, module)
    return module


@pytest.fixture(scope="session")
def gguf() -> ModuleType:
    return util("gguf")


@pytest.fixture(scope="session")
def gguf_info(gguf: ModuleType) -> ModuleType:
    return load("plugins/modules/gguf_info.py", "llamaherd_gguf_info")


@pytest.fixture(scope="session")
def published_model(gguf: ModuleType) -> ModuleType:
    util("hub")
    return load("plugins/modules/published_model.py", "llamaherd_published_model")


@pytest.fixture(scope="session")
def published_filters(gguf: ModuleType) -> ModuleType:
    return load("plugins/filter/published.py", "llamaherd_published_filters")


@pytest.fixture(scope="session")
def traffic_filters() -> ModuleType:
    return load("plugins/filter/traffic.py", "llamaherd_traffic_filters")


@pytest.fixture(scope="session")
def usage_filters() -> ModuleType:
    return load("plugins/filter/usage.py", "llamaherd_usage_filters")


@pytest.fixture(scope="session")
def nginx_facts() -> ModuleType:
    return load("plugins/module_utils/nginx.py", "ansible_collections.llamaherd.llamaherd.plugins.module_utils.nginx")


@pytest.fixture(scope="session")
def host_facts(nginx_facts: ModuleType) -> ModuleType:
    return load("plugins/modules/host_facts.py", "llamaherd_host_facts")


def checker() -> ModuleType:
    """check_variables, and what it takes from the collection."""
    util("setting_rules")
    util("value_formats")
    return load("plugins/action/check_variables.py", "llamaherd_check_variables")


@pytest.fixture(scope="session")
def check_variables() -> ModuleType:
    return checker()


@pytest.fixture(scope="session")
def progress() -> ModuleType:
    return load("plugins/action/progress.py", "llamaherd_progress")


@pytest.fixture(scope="session")
def filters() -> ModuleType:
    util("setting_rules")
    return load("plugins/filter/llamaherd.py", "llamaherd_filters")


@pytest.fixture(scope="session")
def model_filters(gguf: ModuleType) -> ModuleType:
    return load("plugins/filter/models.py", "llamaherd_models_filters")


@pytest.fixture(scope="session")
def route_filters() -> ModuleType:
    return load("plugins/filter/routes.py", "llamaherd_routes_filters")


@pytest.fixture(scope="session")
def llama_server_filters(gguf: ModuleType) -> ModuleType:
    return load("plugins/filter/llama_server.py", "llamaherd_llama_server_filters")


@pytest.fixture(scope="session")
def certificate_filters() -> ModuleType:
    return load("plugins/filter/certificate.py", "llamaherd_certificate_filters")


@pytest.fixture(scope="session")
def fetch_model() -> ModuleType:
    return load("roles/model/files/fetch_model.py", "llamaherd_fetch_model")


@pytest.fixture(scope="session")
def packages() -> ModuleType:
    return load("plugins/filter/packages.py", "llamaherd_packages_filters")
