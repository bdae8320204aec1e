"""The messages between the front end and an engine's worker process.

They are one-way msgpack messages on a Unix socket, prefixed by their length (4 bytes, big endian). A worker sends all
output of a step in one `Step`, never a message per token. Times are in seconds, sizes in bytes, lengths in tokens.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, field

from llamaherd_server.wire.engine_settings import EngineSettings, Placed, Placement
from llamaherd_server.wire.evaluation import Evaluate, Evaluated

FinishReason = Literal["stop", "length"]
Pooling = Literal["mean", "cls", "last", "rank"]
# The first five are errors of a client, which fail only its own request; the others are failures of the server.
ErrorCode = Literal[
    "context_length_exceeded",
    "invalid_value",
    "invalid_grammar",
    "unsupported",
    "does_not_fit",
    "engine_crashed",
    "engine_stopped",
    "internal",
]


class Sampling(Struct, frozen=True, kw_only=True):
    """Sampling parameters; the defaults are llama-server's."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: list[str] = field(default_factory=lambda: ["\n", ":", '"', "*"])
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    ignore_eos: bool = False
    grammar: str | None = None  # GBNF with the root rule `root`


class Adapter(Struct):
    """A LoRA adapter's GGUF and its scaling factor."""

    path: str
    scale: float


class PromptStore(Struct, kw_only=True):
    """Where computed prompts are kept: memory owned by the front end, and files that an earlier server wrote."""

    fd: int
    bytes: int
    folder: str | None = None


class WorkerConfig(Struct, kw_only=True):
    """Configuration of a worker, passed as JSON on its command line.

    `chat_template`: a file that replaces the GGUF's template. `draft`: the draft model's GGUF.
    """

    path: str
    settings: EngineSettings
    placement: Placement = Placement()
    draft: str | None = None
    chat_template: str | None = None
    lora: list[Adapter] = field(default_factory=list)
    prompts: PromptStore | None = None


class NativeConfig(Struct, kw_only=True):
    """Configuration of a llama-server; `mmproj`: GGUF of the multimodal projector, `draft`: GGUF of the draft model."""

    name: str  # of the model, in responses
    binary: str
    path: str
    settings: EngineSettings
    placement: Placement = Placement()
    mmproj: str | None = None
    draft: str | None = None
    chat_template: str | None = None
    lora: list[Adapter] = field(default_factory=list)
    rpc: list[str] = field(default_factory=list)  # host:port
    extra_args: list[str] = field(default_factory=list)


# --- front end to worker -------------------------------------------------------------------------------------


class Media(Struct):
    """Images and other media in base64; the prompt contains `marker` at the place of each."""

    marker: str
    data: list[str]


class ReasoningBudget(Struct, kw_only=True):
    """Limits reasoning, the text between `begin` and `end`, to `tokens`; the engine then inserts `end` itself.

    `begun`: whether the prompt ends inside the reasoning.
    """

    begin: str
    end: str
    tokens: int
    begun: bool = False


class Generate(Struct, tag="generate", kw_only=True):
    """Complete `prompt` (text or token ids). `max_tokens` None: until a stop, or until the slot's context is full."""

    id: int
    prompt: str | list[int]
    add_special: bool = True  # add BOS if the model uses it; false for a rendered chat template
    parse_special: bool = True
    max_tokens: int | None = None
    stop: list[str] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None  # None: off; n: of the chosen token and of the n most likely ones
    cache_prompt: bool = True
    cache_scope: str = ""  # only requests of the same scope share the KV cells of a prefix
    media: Media | None = None  # only with a text prompt, and only for llama-server
    preemptible: bool = False  # gives up its slot to requests that are not preemptible
    owner: str = ""  # name of the key; owners take turns for slow preparation
    preserved: list[str] = field(default_factory=list)  # control tokens to output as text; others are left out
    reasoning: ReasoningBudget | None = None


class Cancel(Struct, tag="cancel"):
    id: int


class Retune(Struct, tag="retune"):
    """Rebuild the context with `settings`; running requests are finished, or preempted and resumed."""

    id: int
    settings: EngineSettings


class Tokenize(Struct, tag="tokenize"):
    """Tokenize a text; with `counted`, return only the number of tokens."""

    id: int
    text: str
    add_special: bool = False
    parse_special: bool = True
    counted: bool = False
    owner: str = ""


class Detokenize(Struct, tag="detokenize"):
    """Convert tokens to text; with `apart`, return the bytes of each token instead."""

    id: int
    tokens: list[int]
    owner: str = ""
    apart: bool = False


class Embed(Struct, tag="embed"):
    """Compute an embedding of each input (text or token ids), or with `query` the relevance of each input to it."""

    id: int
    inputs: list[str | list[int]]
    query: str | None = None
    owner: str = ""


ToWorker = Generate | Cancel | Retune | Tokenize | Detokenize | Embed | Evaluate


# --- worker to front end -------------------------------------------------------------------------------------


class ModelInfo(Struct, tag="model", kw_only=True):
    """Metadata from the GGUF; the chat template is untrusted input."""

    description: str
    architecture: str
    n_params: int
    size_bytes: int
    n_ctx_train: int
    n_vocab: int
    n_embd: int
    add_bos: bool
    bos_token: str
    eos_token: str
    chat_template: str | None
    pooling: Pooling = "mean"  # of its embeddings; rank: the model computes scores for /v1/rerank instead
    fim: tuple[str, str, str] | None = None  # fill-in-the-middle tokens: before the prefix, the suffix and the middle
    sampling: dict[str, int | float] = field(
        default_factory=dict
    )  # the model's defaults, with the field names of Sampling, and max_tokens
    build: str  # llama.cpp's system info line
    placed: Placed | None = None  # None: no accelerator, or llama-server did not choose the placement


class Loading(Struct, tag="loading"):
    progress: float  # 0 to 1


class Ready(Struct, tag="ready", kw_only=True):
    """Sent after a first token has been computed, which shows that the model works."""

    model: ModelInfo
    settings: EngineSettings  # the current ones, with the actual numbers of threads
    load_s: float


class Logprob(Struct, array_like=True):
    token: int
    text: bytes
    logprob: float


class TokenLogprob(Struct, array_like=True):
    token: int
    text: bytes
    logprob: float
    top: list[Logprob]


class Started(Struct, tag="started"):
    """The prompt was tokenized and got a slot. Sent before its computation, which may crash the worker."""

    id: int
    prompt_tokens: int
    cached_tokens: int  # the part of them found in the KV cache


class Delta(Struct, tag="delta", kw_only=True):
    """New text: whole UTF-8 characters, and no start of a possible stop string. May be empty with n_tokens 1."""

    id: int
    text: str
    n_tokens: int
    logprobs: list[TokenLogprob] | None = None


class Finished(Struct, tag="finished", kw_only=True):
    """The successful end of a request; `prompt_s` and `decode_s` are wall times in the engine."""

    id: int
    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prompt_s: float
    decode_s: float
    stop: str | None = None  # the stop string that ended it
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # the part of them that was accepted


class Failed(Struct, tag="failed"):
    """The failure of a generation, a reconfiguration or any other request."""

    id: int
    code: ErrorCode
    message: str
    param: str | None = None
    details: dict[str, int] | None = None


class Stats(Struct, kw_only=True):
    """The worker's state after a step. `overhead_s` is its time outside llama_decode and native sampling."""

    step: int
    slots_busy: int
    waiting: int
    parked: int
    kv_used: int  # cells
    kv_size: int
    batch_tokens: int
    decode_s: float
    sample_s: float
    overhead_s: float
    preemptions: int  # for lack of KV cells; this and the counts below are since the start
    cached_tokens: int
    prompt_tokens: int
    cached_memory_tokens: int = 0  # the part of cached_tokens from prompts that had left their slots
    cached_disk_tokens: int = 0
    prompt_evictions: int = 0
    prompt_bytes: int = 0  # currently used for prompts that have left their slots
    prompt_limit_bytes: int = 0
    drafted_tokens: int = 0  # since the start
    accepted_tokens: int = 0
    slots_taken: int = 0  # preemptions of preemptible requests in favor of others


class Step(Struct, tag="step"):
    """All results of one step; an idle worker sends one each second as its heartbeat."""

    events: list[Started | Delta | Finished | Failed]
    stats: Stats


class Retuned(Struct, tag="retuned"):
    id: int
    settings: EngineSettings
    took_s: float


class Tokens(Struct, tag="tokens"):
    id: int
    count: int
    tokens: list[int]


class Text(Struct, tag="text"):
    id: int
    text: str
    pieces: list[bytes] = field(default_factory=list)  # instead of the text, if `apart` was set


class Embedded(Struct, tag="embedded"):
    """A vector of native f32 numbers for each input, with Euclidean length 1; with a query, the input's score."""

    id: int
    vectors: list[bytes]
    tokens: int  # of all inputs


FromWorker = Loading | Ready | Started | Step | Retuned | Tokens | Text | Embedded | Evaluated | Failed
