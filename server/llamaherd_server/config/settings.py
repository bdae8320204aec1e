"""The server's settings: a TOML file, overridden by LLAMAHERD_SECTION__NAME in the environment.

Every mistake is a SettingsError with one line a mistake: the setting, what is wrong, the remedy.
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
    """What is wrong with the settings, for a person."""


class Section(BaseModel):
    """A table of the file; names it does not know are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    return path


class HttpSettings(Section):
    """Where the server listens."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=1, le=65535)
    # Web pages of these origins may call the API; "*": all. None: browsers keep every page out.
    cors_origins: list[str] = []
    # Without keys: names that clients may use for this server besides this machine's own.
    allowed_hosts: list[str] = []


class AuthSettings(Section):
    """Who may use the server; required for any host beyond loopback."""

    keys_file: Path | None = None
    # Which of this host's servers this one is, from 0, where several have a part of the keys' limits.
    instance: int = Field(default=0, ge=0)


def _checked_sampling(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of requests with values that the engines take."""
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
# As an alias: the model answers to every name that is no other model's.
ANY_NAME = "*"
ModelName = Annotated[str, Field(min_length=1, max_length=256)]


class AdapterSettings(Section):
    """A LoRA as GGUF, added to the weights `scale` times."""

    path: ExistingFile
    scale: float = 1.0


class ModelSettings(Section):
    """A model that is served; its `placement` lies in the same table.

    `mmproj`: a multimodal projector, for llama-server. `draft`: a smaller model of the same vocabulary.
    `chat_template`: a Jinja file that goes before the GGUF's own. `chat_template_kwargs`: variables for it, where a
    request gives none of the name. `sampling`: fields of requests, `max_tokens` among them, where a request leaves them
    out. `aliases`: of the only model, ["*"] unless given. `memory_mib`: what weights and context may take, where
    ctx_per_slot is 0; None: this model's share of the host's. `residence`: a model `on_demand` is loaded for the first
    request, and unloaded when it has had none for `idle_s` seconds or another one needs its place.
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
    """Which engine, and what its context is built from; both lie side by side in the file's [engine] table."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    kind: EngineKind = "embedded"
    # llama-server alone: its program, left out: that of the build whose libraries are used; and more of its flags.
    binary: ExistingFile | None = None
    extra_args: list[str] = []
    # llama-server alone: rpc-servers, host:port, whose devices are used like its own.
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
        """Where llama-server is; raises SettingsError."""
        libraries = os.environ.get("LLAMA_CPP_LIB_PATH")
        found = self.binary or (libraries and Path(libraries).parent / "bin" / "llama-server")
        if not found:
            raise SettingsError("engine.binary: set it, or LLAMA_CPP_LIB_PATH, whose build has a llama-server")
        if not os.access(found, os.X_OK):
            raise SettingsError(f"engine.binary: {found} is not an executable program")
        return found


IMAGES_BYTES = 32 * 2**20
_ENGINE_OWN = ("kind", "binary", "extra_args", "rpc")


class ServedModel(ModelSettings):
    """One of several models. What its engine table leaves out is as the file's [engine] says."""

    engine: EngineSection = EngineSection()

    @model_validator(mode="after")
    def _has_its_engine(self) -> Self:
        drafts = self.engine.settings.speculative
        needing = {"mmproj": self.mmproj, 'speculative = "mtp"': drafts == "mtp"}
        if self.engine.kind != "llama-server" and (found := next((name for name, has in needing.items() if has), None)):
            raise ValueError(f'{found} needs kind = "llama-server" in the engine table')
        if drafts == "draft" and not self.draft:
            raise ValueError('speculative = "draft" needs draft: the GGUF of a smaller model of the same vocabulary')
        return self


class LimitSettings(Section):
    """Bounds on requests. Times are seconds."""

    max_queue: int = Field(default=256, ge=1)
    # Expected prompt and completion tokens of all that wait.
    max_queue_tokens: int = Field(default=2**20, ge=1)
    queue_timeout_s: float = Field(default=60, gt=0)
    first_token_timeout_s: float = Field(default=300, gt=0)
    request_timeout_s: float = Field(default=600, gt=0)
    # A connection that takes none of what it is sent for so long, or sends none of its request's body, is closed.
    idle_client_timeout_s: float = Field(default=30, ge=1)
    # Generations in one request: its prompts times n.
    max_generations: int = Field(default=128, ge=1)
    # Left out: 32 MiB where a model takes images, as Anthropic's API does.
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    drain_timeout_s: float = Field(default=30, ge=0)
    # Who shares the computed beginnings of prompts: requests of the same key, or all. Times and `cached_tokens` tell a
    # client what others that it shares with have asked.
    prompt_cache_scope: Literal["key", "server"] = "key"
    # Memory for each model's computed prompts that have left their slots; 0: none. Left out: 8 GiB for all, as
    # llama-server takes, but at most a quarter of what is available. Of llama-server it is the --cache-ram.
    prompt_cache_mib: int | None = Field(default=None, ge=0)
    # Where they are while the server is not running; left out: nowhere. In it each model has a folder of its own.
    prompt_cache_dir: Path | None = None
    # Where it is kept what each key used, for so many days; left out: nowhere beyond the process. Servers of one host
    # share it.
    usage_dir: Path | None = None
    usage_days: int = Field(default=400, ge=31, le=36500)
    # How many of the models on demand are loaded at once.
    models_loaded: int = Field(default=1, ge=1)
    # How long an engine may take from its start until it has computed a first token.
    load_timeout_s: float = Field(default=900, gt=0)
    # Above the slowest step, which is a whole batch of prompt on this host.
    heartbeat_timeout_s: float = Field(default=120, gt=0)


class LogSettings(Section):
    """What the log may hold. `texts`: prompts and outputs, which are the users' own; not of what is passed on.

    `prefixes`: hashes of a prompt's beginnings, by which it is known what requests share; no text can be had from them.
    """

    texts: bool = False
    prefixes: bool = False


def _otlp_endpoint(value: str) -> str:
    if not is_otlp_endpoint(value):
        raise ValueError(f"must be {OTLP_ENDPOINT}, not {value!r}")
    return value.rstrip("/")


class TelemetrySettings(Section):
    """Where traces of requests go, by OTLP over HTTP; left out: nowhere.

    `otlp_headers_file`: what the collector asks for, a line `Name: value` each. `otlp_ratio`: the share of requests
    that are traced; one that belongs to a trace already (W3C's `traceparent`) is traced where its flags say so.
    """

    otlp_endpoint: Annotated[str, AfterValidator(_otlp_endpoint)] | None = None
    otlp_headers_file: ExistingFile | None = None
    otlp_ratio: float = Field(default=1.0, ge=0, le=1)


class Settings(BaseSettings):
    """All of server.toml. With [[models]], `model` and `engine` are the first one's; with [model], it is the list."""

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
            raise ValueError("there are both [model] and [[models]]: put all models into [[models]]")
        if not isinstance(models, list) or not all(isinstance(one, dict) for one in models) or not models:
            raise ValueError("models must be tables: write [[models]] above each one")
        models = [{**one, "engine": {**engine, **one.get("engine", {})}} for one in models]
        first = dict(models[0])
        return {**table, "models": models, "engine": first.pop("engine"), "model": first}

    @model_validator(mode="before")
    @classmethod
    def _room_for_images(cls, table: dict[str, Any]) -> dict[str, Any]:
        models, limits = table.get("models", [table.get("model")]), table.get("limits", {})
        listed = models if isinstance(models, list) else []
        if not any(isinstance(one, dict) and one.get("mmproj") for one in listed) or not isinstance(limits, dict):
            return table
        return {**table, "limits": {"max_body_bytes": IMAGES_BYTES, **limits}}

    @model_validator(mode="after")
    def _names_differ(self) -> Settings:
        names = [name for model in self.models for name in (model.name, *model.aliases)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the name {twice!r} is given twice: every name and alias must be one model's")
        return self

    def each(self) -> list[Settings]:
        """The same settings once for every model, each as if there were no other."""
        return [self.model_copy(update={"model": one, "engine": one.engine, "models": [one]}) for one in self.models]

    def loaded_at_once(self) -> int:
        """How many models share the memory, at most."""
        on_demand = sum(model.residence == "on_demand" for model in self.models)
        return len(self.models) - on_demand + min(on_demand, self.limits.models_loaded)

    def with_engine(self, kind: EngineKind, settings: EngineSettings) -> Settings:
        """The same for one model on that engine; raises SettingsError where what is set beside it is the other's."""
        own = {name: getattr(self.engine, name) for name in _ENGINE_OWN}
        table = {**dict(self.models[0]), "engine": {**own, "kind": kind, **msgspec.to_builtins(settings)}}
        try:
            one = ServedModel.model_validate(table)
        except ValidationError as error:
            raise SettingsError("; ".join(map(_line, error.errors()))) from None
        return self.model_copy(update={"model": one, "engine": one.engine, "models": [one]})

    @model_validator(mode="after")
    def _closed_beyond_loopback(self) -> Settings:
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
        """The environment goes before the file; nothing else is read."""
        del settings_cls, dotenv_settings, file_secret_settings
        return env_settings, init_settings


def load(path: Path) -> Settings:
    """Read `path` and the environment; raises SettingsError."""
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
        # what the file does not have itself was made of what it has
        derived = {"model", "engine"} if "models" in table else {"models"}
        errors = error.errors()
        told = [item for item in errors if not derived & {*item["loc"][:1]}] or errors
        raise SettingsError("\n".join(f"{path}: {_line(item)}" for item in told)) from None


def _line(item: Any) -> str:
    name = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        section = Settings.model_fields.get(item["loc"][0]) if len(item["loc"]) > 1 else None
        known = section.annotation.model_fields if section and section.annotation else Settings.model_fields
        return f"unknown setting {name}{nearest(str(item['loc'][-1]), known)}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name else message
