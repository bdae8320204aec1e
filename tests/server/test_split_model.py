"""A model in parts, behind a link of any name, computes what the same model in one file does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from llamaherd_server.wire.engine_settings import EngineSettings, Placement
from llamaherd_server.wire.protocol import WorkerConfig
from llamaherd_server.worker.fit import Fit
from llamaherd_server.worker.identity import identity
from tests.server.conftest import required, running
from tests.server.native.conftest import native
from tests.split_model import split

QUESTION = {
    "messages": [{"role": "user", "content": "Name the capital of France."}],
    "temperature": 0,
    "max_tokens": 24,
}


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the store has it: chat.gguf leads to the first part, whose name is the model's digest."""
    folder = tmp_path_factory.mktemp("store")
    parts = split(Path(required("LLAMAHERD_TEST_MODEL")), folder / f"{'a' * 64}.gguf", 100)
    assert [part.name[64:] for part in parts] == [f"-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    link = folder / "chat.gguf"
    link.symlink_to(parts[0].name)
    return link


def answer(folder: Path, model: Path, engine: str) -> str:
    section = native() if engine == "llama-server" else {}
    with running(folder, engine=section, model={"path": str(model)}) as server:
        response = httpx.post(f"{server.url}/v1/chat/completions", json=QUESTION, timeout=60)
        response.raise_for_status()
        return str(response.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("engine", ["embedded", "llama-server"])
def test_a_split_model_answers_as_the_whole_one(tmp_path: Path, link: Path, engine: str) -> None:
    said = answer(tmp_path, link, engine)
    assert said == answer(tmp_path, Path(required("LLAMAHERD_TEST_MODEL")), engine)
    assert "Paris" in said


def test_computed_prompts_are_those_of_all_parts(tmp_path: Path) -> None:
    """Of a model with another second part, what was computed before is not taken."""
    (tmp_path / "libllama.so").touch()
    library = SimpleNamespace(_name=str(tmp_path / "libllama.so"))
    lib = SimpleNamespace(_lib=library, llama_print_system_info=lambda: b"")
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    found = []
    for second in (b"one", b"two"):
        parts[0].write_bytes(b"GGUF")
        parts[1].write_bytes(second)
        found.append(identity(lib, WorkerConfig(path=str(parts[0]), settings=EngineSettings()), Fit(Placement(), [])))
    assert found[0] != found[1]
