"""server.toml and the environment: what they give, and one clear line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaherd_server.config.settings import SettingsError, load


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    return f'[model]\nname = "m"\npath = "{tmp_path}/m.gguf"\n'


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "server.toml"
    path.write_text(text)
    return path


def test_defaults_are_a_working_server(tmp_path: Path, model: str) -> None:
    settings = load(written(tmp_path, model))
    assert (settings.http.host, settings.http.port) == ("127.0.0.1", 8080)
    assert settings.engine.settings.parallel == 4


def test_the_environment_goes_before_the_file(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMAHERD_HTTP__PORT", "9000")
    monkeypatch.setenv("LLAMAHERD_ENGINE__KV_UNIFIED", "false")
    settings = load(written(tmp_path, f"{model}[http]\nport = 8000\n[engine]\nparallel = 7\n"))
    assert settings.http.port == 9000
    assert (settings.engine.settings.parallel, settings.engine.settings.kv_unified) == (7, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[http]\nprot = 1", "unknown setting http.prot: did you mean 'port'?"),
        ("[htp]\nport = 1", "unknown setting htp: did you mean 'http'?"),
        ("[http]\nport = 70000", "http.port: Input should be less than or equal to 65535"),
        ("[engine]\nparalel = 1", "engine: unknown engine setting 'paralel': did you mean 'parallel'?"),
        ("[engine]\nparallel = 257", "engine: parallel 257 is out of range: it must be between 1 and 256"),
        ("[engine]\nbatch = 64", "engine: ubatch 512 is larger than batch 64: lower ubatch or raise batch"),
        ('[engine]\nkv_type_k = "f8"', "Invalid enum value 'f8'"),
        ('[engine]\nkv_type_v = "q8_0"\nflash_attention = "off"', "needs flash attention"),
        ('[engine]\nkind = "vllm"', "engine.kind: Input should be 'embedded'"),
        ("[model.sampling]\ntemperture = 1", "model.sampling: unknown field 'temperture': did you mean 'temperature'?"),
        ("[model.sampling]\ntop_p = 2", "model.sampling: top_p 2 must be between 0 and 1"),
        ('[model.sampling]\ntop_k = "x"', "model.sampling: Expected `int`, got `str` - at `$.top_k`"),
        ('[http]\nhost = "0.0.0.0"', "set auth.keys_file, or http.host"),
        ("[http\n", "is not valid TOML"),
        ('[telemetry]\notlp_endpoint = "collector:4318"', "telemetry.otlp_endpoint: must be the http or https URL"),
        ('[telemetry]\notlp_endpoint = "http://c:4318/v1/traces"', "not 'http://c:4318/v1/traces'"),
        ('[telemetry]\notlp_endpoint = "http://c:99999"', "such as http://collector.internal:4318, not"),
        ('[telemetry]\notlp_endpoint = "https://me:secret@c"', "without user, query and /v1/traces"),
        ('[telemetry]\notlp_headers_file = "/nowhere"', "telemetry.otlp_headers_file: no such file: /nowhere"),
        ("[telemetry]\notlp_ratio = 2", "telemetry.otlp_ratio: Input should be less than or equal to 1"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, model: str, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        load(written(tmp_path, f"{model}\n{text}\n"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_model_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"model\.path: no such file: /nowhere\.gguf"):
        load(written(tmp_path, '[model]\nname = "m"\npath = "/nowhere.gguf"\n'))


def test_an_unknown_section_in_the_environment_is_named(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMAHERD_LIMIT__MAX_QUEUE", "1")
    with pytest.raises(SettingsError, match=r"unknown section limit: did you mean 'limits'\?"):
        load(written(tmp_path, model))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('mmproj = "{}/m.gguf"\n[engine]\nkind = "llama-server"', 'mmproj needs kind = "llama-server"'),
        ('[engine]\nkind = "llama-server"\nrpc = ["w1:50052"]', "binary, extra_args and rpc are for"),
        ('[engine]\nkind = "llama-server"\nbinary = "{}/m.gguf"', "binary, extra_args and rpc are for"),
    ],
)
def test_what_is_llama_servers_alone_does_not_go_to_the_embedded_engine(
    tmp_path: Path, model: str, text: str, message: str
) -> None:
    settings = load(written(tmp_path, model + text.format(tmp_path)))
    with pytest.raises(SettingsError, match=message):
        settings.with_engine("embedded", settings.engine.settings)


def test_another_engine_keeps_the_rest(tmp_path: Path, model: str) -> None:
    adapter = f'aliases = ["n"]\nlora = [{{path = "{tmp_path}/m.gguf", scale = 0.5}}]\n'
    [settings] = load(written(tmp_path, f"{model}{adapter}[engine]\nparallel = 7\n")).each()
    other = settings.with_engine("llama-server", settings.engine.settings)
    assert (other.engine.kind, other.engine.settings.parallel) == ("llama-server", 7)
    assert other.with_engine("embedded", settings.engine.settings) == settings


@pytest.mark.parametrize(("line", "aliases"), [("", ["*"]), ('aliases = ["n"]', ["n"]), ("aliases = []", [])])
def test_the_only_model_answers_to_any_name_unless_its_aliases_are_given(
    tmp_path: Path, model: str, line: str, aliases: list[str]
) -> None:
    settings = load(written(tmp_path, model + line))
    assert (settings.model.aliases, settings.models[0].aliases) == (aliases, aliases)


@pytest.mark.parametrize(
    ("projector", "limits", "expected"),
    [(False, "", 4 * 2**20), (True, "", 32 * 2**20), (True, "[limits]\nmax_body_bytes = 8192\n", 8192)],
)
def test_images_have_room(tmp_path: Path, projector: bool, limits: str, expected: int) -> None:
    path = tmp_path / "m.gguf"
    path.touch()
    more = f'mmproj = "{path}"\n[engine]\nkind = "llama-server"\n' if projector else ""
    for head in ("[model]", "[[models]]"):
        body = more.replace("[engine]", "[models.engine]") if head == "[[models]]" else more
        settings = load(written(tmp_path, f'{head}\nname = "m"\npath = "{path}"\n{body}{limits}'))
        assert settings.limits.max_body_bytes == expected
