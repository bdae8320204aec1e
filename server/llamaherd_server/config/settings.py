"""The server's settings: a TOML file, overridden by LLAMAHERD_SECTION__NAME in the environment.

Invalid settings raise SettingsError, with one line per error: the setting, what is wrong, the remedy.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from llamaherd_server.config.engine_settings import merge, schema
from llamaherd_server.config.extra_args import check_extra_args
from llamaherd_server.config.loopback import is_loopback
from llamaherd_server.config.setting_rules import OTLP_ENDPOINT, is_otlp_endpoint
from llamaherd_server.errors import nearest
from llamaherd_server.wire.engine_settings import EngineKind, EngineSettings, Placement
from llamaherd_server.wire.protocol import Adapter, Sampling
from llamaherd_server.wire.sampling_values import checked


class SettingsError(Exception):
    """The settings are invalid. The message is for the operator."""


class Section(BaseModel):
    """A table of the file. Unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    return path


class HttpSettings(Section):
    """Where the server listens."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=1, le=65535)
    # Origins whose web pages may call the API; "*": all. Empty: browsers block every page.
    cors_origins: list[str] = []
    # Without keys: host names that clients may use for this server, besides loopback names.
    allowed_hosts: list[str] = []


class AuthSettings(Section):
    """Who may use the server. Keys are required unless `http.host` is a loopback address."""

    keys_file: Path | None = None
    # This server's number among those on this host, from 0, if several share the keys' limits.
    instance: int = Field(default=0, ge=0)


def _checked_sampling(given: dict[str, Any]) -> dict[str, Any]:
    """Validate default values for request fields."""
    known = {*Sampling.__struct_fields__, "max_tokens"} - {"grammar", "logit_bias"}
    if unknown := next((name for name in given if name not in known), None):
        raise ValueError(f"unknown field {unknown!r}{nearest(unknown, known)}")
    try:
        msgspec.convert({name: value for name, value in given.items() if name != "max_tokens"}, Sampling)
        msgspec.convert(given.get("max_tokens", 1), Annotated[int, msgspec.Meta(ge=1)])
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    return checked(given, n_vocab=2**31, context=2**31)


ExistingFile = Annotated[Path, AfterValidator(_existing_file)]
# As an alias: the model serves every name that belongs to no other model.
ANY_NAME = "*"
ModelName = Annotated[str, Field(min_length=1, max_length=256)]


class AdapterSettings(Section):
    """A LoRA adapter as GGUF, and its scaling factor."""

    path: ExistingFile
    scale: float = 1.0


class ModelSettings(Section):
    """A served model. The settings of its `placement` are in the same table of the file.

    `mmproj`: a multimodal projector, for llama-server. `draft`: a smaller model with the same vocabulary.
    `chat_template`: a Jinja file that replaces the GGUF's template. `chat_template_kwargs`: default variables for it.
    `sampling`: defaults for request fields, including `max_tokens`. `aliases`: default ["*"] for a single model.
    `memory_mib`: memory for weights and context if ctx_per_slot is 0; None: this model's share of the host's memory.
    `residence`: a model `on_demand` is loaded for the first request, and unloaded after `idle_s` seconds without one or
    when another model needs its place.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: ModelName
    aliases: list[ModelName] = []
    path: ExistingFile
    placement: Placement = Placement()
    mmproj: ExistingFile | None = None
    draft: ExistingFile | None = None
    chat_template: ExistingFile | None = None
    chat_template_kwargs: dict[str, Any] = {}
    sampling: Annotated[dict[str, Any], AfterValidator(_checked_sampling)] = {}
    lora: list[AdapterSettings] = []
    memory_mib: int | None = Field(default=None, ge=1)
    residence: Literal["resident", "on_demand"] = "resident"
    idle_s: float = Field(default=600, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _split(cls, table: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(table, dict) or "placement" in table:
            return table
        placed = {name: value for name, value in table.items() if name in schema(Placement)}
        own = {name: value for name, value in table.items() if name not in placed}
        return {**own, "placement": merge(Placement(), placed)}

    def adapters(self) -> list[Adapter]:
        return [Adapter(str(one.path), one.scale) for one in self.lora]


class EngineSection(Section):
    """The engine and its context settings, which are side by side in the file's [engine] table."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    kind: EngineKind = "embedded"
    # For llama-server only: its program (default: from the same build as the libraries), and additional flags.
    binary: ExistingFile | None = None
    extra_args: list[str] = []
    # For llama-server only: rpc-servers (host:port) whose devices it uses like local ones.
    rpc: list[Annotated[str, Field(pattern=r"^[\w.-]+:\d+$")]] = []
    settings: EngineSettings = EngineSettings()

    @model_validator(mode="before")
    @classmethod
    def _split(cls, table: dict[str, Any]) -> dict[str, Any]:
        own = {name: value for name, value in table.items() if name in _ENGINE_OWN}
        context = {name: value for name, value in table.items() if name not in _ENGINE_OWN}
        return {**own, "settings": merge(EngineSettings(), context)}

    @model_validator(mode="after")
    def _only_with_llama_server(self) -> Self:
        if self.kind == "embedded" and (self.binary or self.extra_args or self.rpc):
            raise ValueError('binary, extra_args and rpc are for kind = "llama-server"')
        check_extra_args(self.extra_args)
        return self

    def program(self) -> Path:
        """Return the path of llama-server. Raises SettingsError."""
        libraries = os.environ.get("LLAMA_CPP_LIB_PATH")
        found = self.binary or (libraries and Path(libraries).parent / "bin" / "llama-server")
        if not found:
            raise SettingsError("engine.binary: set it, or set LLAMA_CPP_LIB_PATH to a build with llama-server")
        if not os.access(found, os.X_OK):
            raise SettingsError(f"engine.binary: {found} is not an executable program")
        return found


MAX_BODY_BYTES_WITH_IMAGES = 32 * 2**20
_ENGINE_OWN = ("kind", "binary", "extra_args", "rpc")


class ServedModel(ModelSettings):
    """One of several models. The file's [engine] table has the defaults for its own engine table."""

    engine: EngineSection = EngineSection()

    @model_validator(mode="after")
    def _has_its_engine(self) -> Self:
        drafts = self.engine.settings.speculative
        if self.engine.kind != "llama-server" and self.mmproj:
            raise ValueError('mmproj needs kind = "llama-server" in the engine table')
        if drafts == "draft" and not self.draft:
            raise ValueError('speculative = "draft" needs draft: the GGUF of a smaller model of the same vocabulary')
        return self


class LimitSettings(Section):
    """Limits on requests. Times are in seconds."""

    max_queue: int = Field(default=256, ge=1)
    # Expected prompt and completion tokens of all queued requests.
    max_queue_tokens: int = Field(default=2**20, ge=1)
    queue_timeout_s: float = Field(default=60, gt=0)
    first_token_timeout_s: float = Field(default=300, gt=0)
    request_timeout_s: float = Field(default=600, gt=0)
    # A connection is closed if for this long it reads nothing of the response or sends nothing of the request's body.
    idle_client_timeout_s: float = Field(default=30, ge=1)
    # Generations per request: its number of prompts times n.
    max_generations: int = Field(default=128, ge=1)
    # Default if a model has mmproj: 32 MiB, as in Anthropic's API.
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    drain_timeout_s: float = Field(default=30, ge=0)
    # Which requests share computed prompt prefixes: those of the same key, or all. Response times and `cached_tokens`
    # can reveal to a client which prompts others in its scope have sent.
    prompt_cache_scope: Literal["key", "server"] = "key"
    # Memory per model for computed prompts that have left their slots; 0: none. Default: 8 GiB for all models together,
    # as in llama-server, but at most a quarter of the available memory. llama-server gets it as --cache-ram.
    prompt_cache_mib: int | None = Field(default=None, ge=0)
    # Where they are stored while the server is stopped, with one folder per model; default: nowhere.
    prompt_cache_dir: Path | None = None
    # Where each key's usage is stored for `usage_days` days; default: only in memory. The servers of one host share
    # the directory.
    usage_dir: Path | None = None
    usage_days: int = Field(default=400, ge=31, le=36500)
    # How many models on demand are loaded at once.
    models_loaded: int = Field(default=1, ge=1)
    # From an engine's start to its first computed token.
    load_timeout_s: float = Field(default=900, gt=0)
    # Must exceed the slowest step: a full batch of prompt tokens on this host.
    heartbeat_timeout_s: float = Field(default=120, gt=0)


class LogSettings(Section):
    """What the log may contain. `texts`: prompts and outputs, which are user data, except of requests passed on.

    `prefixes`: hashes of a prompt's prefixes, which show what requests share without revealing the text.
    """

    texts: bool = False
    prefixes: bool = False


def _otlp_endpoint(value: str) -> str:
    if not is_otlp_endpoint(value):
        raise ValueError(f"must be {OTLP_ENDPOINT}, not {value!r}")
    return value.rstrip("/")


class TelemetrySettings(Section):
    """Where traces of requests are sent by OTLP over HTTP; default: nowhere.

    `otlp_headers_file`: headers for the collector, one `Name: value` per line. `otlp_ratio`: the share of requests
    that are traced. For a request that already belongs to a trace (W3C's `traceparent`), the trace's flags decide.
    """

    otlp_endpoint: Annotated[str, AfterValidator(_otlp_endpoint)] | None = None
    otlp_headers_file: ExistingFile | None = None
    otlp_ratio: float = Field(default=1.0, ge=0, le=1)


class Settings(BaseSettings):
    """All of server.toml. With [[models]], `model` and `engine` are the first model's; [model] makes a list of one."""

    model_config = SettingsConfigDict(
        env_prefix="LLAMAHERD_", env_nested_delimiter="__", extra="forbid", frozen=True, allow_inf_nan=False
    )

    http: HttpSettings = HttpSettings()
    auth: AuthSettings = AuthSettings()
    model: ModelSettings
    engine: EngineSection = EngineSection()
    models: list[ServedModel] = Field(min_length=1)
    limits: LimitSettings = LimitSettings()
    log: LogSettings = LogSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @model_validator(mode="before")
    @classmethod
    def _one_or_several(cls, table: dict[str, Any]) -> dict[str, Any]:
        engine, models = table.get("engine", {}), table.get("models")
        if models is None:
            if not isinstance(model := table.get("model"), dict):
                return table
            model = {"aliases": [ANY_NAME], **model}
            return {**table, "model": model, "models": [{**model, "engine": engine}]}
        if "model" in table:
            raise ValueError("[model] and [[models]] cannot be combined: put all models into [[models]]")
        if not isinstance(models, list) or not all(isinstance(one, dict) for one in models) or not models:
            raise ValueError("models must be tables: write [[models]] above each one")
        models = [{**one, "engine": {**engine, **one.get("engine", {})}} for one in models]
        first = dict(models[0])
        return {**table, "models": models, "engine": first.pop("engine"), "model": first}

    @model_validator(mode="before")
    @classmethod
    def _allow_images(cls, table: dict[str, Any]) -> dict[str, Any]:
        models, limits = table.get("models", [table.get("model")]), table.get("limits", {})
        listed = models if isinstance(models, list) else []
        if not any(isinstance(one, dict) and one.get("mmproj") for one in listed) or not isinstance(limits, dict):
            return table
        return {**table, "limits": {"max_body_bytes": MAX_BODY_BYTES_WITH_IMAGES, **limits}}

    @model_validator(mode="after")
    def _require_unique_names(self) -> Settings:
        names = [name for model in self.models for name in (model.name, *model.aliases)]
        if duplicate := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the name {duplicate!r} is used twice: names and aliases must be unique")
        return self

    def each(self) -> list[Settings]:
        """Return these settings once per model, each as if it were the only one."""
        return [self.model_copy(update={"model": one, "engine": one.engine, "models": [one]}) for one in self.models]

    def loaded_at_once(self) -> int:
        """Return the largest number of models in memory at once."""
        on_demand = sum(model.residence == "on_demand" for model in self.models)
        return len(self.models) - on_demand + min(on_demand, self.limits.models_loaded)

    def with_engine(self, kind: EngineKind, settings: EngineSettings) -> Settings:
        """Return these settings for one model on engine `kind`. Raises SettingsError if other settings exclude that."""
        own = {name: getattr(self.engine, name) for name in _ENGINE_OWN}
        table = {**dict(self.models[0]), "engine": {**own, "kind": kind, **msgspec.to_builtins(settings)}}
        try:
            one = ServedModel.model_validate(table)
        except ValidationError as error:
            raise SettingsError("; ".join(map(_line, error.errors()))) from None
        return self.model_copy(update={"model": one, "engine": one.engine, "models": [one]})

    @model_validator(mode="after")
    def _require_keys_beyond_loopback(self) -> Settings:
        if self.auth.keys_file is None and not is_loopback(self.http.host):
            raise ValueError(
                f'http.host "{self.http.host}" can be reached from other machines but there are no keys: '
                'set auth.keys_file, or http.host = "127.0.0.1"'
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use the environment before the file, and no other source."""
        del settings_cls, dotenv_settings, file_secret_settings
        return env_settings, init_settings


def load(path: Path) -> Settings:
    """Read `path` and the environment. Raises SettingsError."""
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from None
    for name in os.environ:
        section = name.removeprefix("LLAMAHERD_").partition("__")[0].lower()
        if name.startswith("LLAMAHERD_") and "__" in name and section not in Settings.model_fields:
            raise SettingsError(f"{name}: unknown section {section}{nearest(section, Settings.model_fields)}")
    try:
        return Settings(**table)
    except ValidationError as error:
        # errors in derived tables repeat those in the file's own
        derived = {"model", "engine"} if "models" in table else {"models"}
        errors = error.errors()
        reported = [item for item in errors if not derived & {*item["loc"][:1]}] or errors
        raise SettingsError("\n".join(f"{path}: {_line(item)}" for item in reported)) from None


def _line(item: Any) -> str:
    name = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        section = Settings.model_fields.get(item["loc"][0]) if len(item["loc"]) > 1 else None
        known = section.annotation.model_fields if section and section.annotation else Settings.model_fields
        return f"unknown setting {name}{nearest(str(item['loc'][-1]), known)}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name else message
