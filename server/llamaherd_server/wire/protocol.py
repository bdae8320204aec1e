"""The messages between the front end and an engine's worker process.

One direction each, msgpack on a Unix socket, length-prefixed (4 bytes, big endian). A worker sends all that a
step produced in one `Step`, never one message per token. Times are seconds; sizes are bytes; lengths are tokens.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, field

from llamaherd_server.wire.engine_settings import EngineSettings, Placed, Placement
from llamaherd_server.wire.evaluation import Evaluate, Evaluated

FinishReason = Literal["stop", "length"]
Pooling = Literal["mean", "cls", "last", "rank"]
# What a client did wrong (its request fails alone) against what went wrong here.
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
    """A LoRA's GGUF, and how strongly it is applied."""

    path: str
    scale: float


class PromptStore(Struct, kw_only=True):
    """Where computed prompts are kept: memory of the front end's, and files of an earlier server's."""

    fd: int
    bytes: int
    folder: str | None = None


class WorkerConfig(Struct, kw_only=True):
    """What a worker is started with, as JSON on its command line.

    `chat_template`: a file, before the GGUF's own. `draft`: a draft model's GGUF.
    """

    path: str
    settings: EngineSettings
    placement: Placement = Placement()
    draft: str | None = None
    chat_template: str | None = None
    lora: list[Adapter] = field(default_factory=list)
    prompts: PromptStore | None = None


class NativeConfig(Struct, kw_only=True):
    """What a llama-server is started with; `mmproj`: its multimodal projector's GGUF, `draft`: its draft model's."""

    name: str  # of the model, in answers
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
    """Images and the like, in base64; `marker` stands in the prompt where each belongs."""

    marker: str
    data: list[str]


class ReasoningBudget(Struct, kw_only=True):
    """Of reasoning, which stands between `begin` and `end`, at most `tokens`; then `end` is written for the model.

    `begun`: the prompt ends within it.
    """

    begin: str
    end: str
    tokens: int
    begun: bool = False


class Generate(Struct, tag="generate", kw_only=True):
    """Complete `prompt` (text, or token ids). `max_tokens` None: until a stop or the slot's context is full."""

    id: int
    prompt: str | list[int]
    add_special: bool = True  # BOS where the model asks for it; false for a rendered chat template
    parse_special: bool = True
    max_tokens: int | None = None
    stop: list[str] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None  # None: off; n: the chosen token's and the n most likely ones'
    cache_prompt: bool = True
    cache_scope: str = ""  # the KV cells of a prefix are shared among requests of the same one
    media: Media | None = None  # only where the prompt is text and the engine llama-server
    preemptible: bool = False  # leaves its slot to requests that are not
    owner: str = ""  # whose it is: what is slow to make ready is done in turns among owners
    preserved: list[str] = field(default_factory=list)  # control tokens that are text here: others are not told
    reasoning: ReasoningBudget | None = None


class Cancel(Struct, tag="cancel"):
    id: int


class Retune(Struct, tag="retune"):
    """Rebuild the context with `settings`; running requests are finished or parked and resumed."""

    id: int
    settings: EngineSettings


class Tokenize(Struct, tag="tokenize"):
    """`counted`: how many tokens there are is all that is asked."""

    id: int
    text: str
    add_special: bool = False
    parse_special: bool = True
    counted: bool = False
    owner: str = ""


class Detokenize(Struct, tag="detokenize"):
    """`apart`: the bytes of each token are asked for, not the text of all."""

    id: int
    tokens: list[int]
    owner: str = ""
    apart: bool = False


class Embed(Struct, tag="embed"):
    """The embedding of each input, text or token ids; with a `query`, the relevance of each input to it instead."""

    id: int
    inputs: list[str | list[int]]
    query: str | None = None
    owner: str = ""


ToWorker = Generate | Cancel | Retune | Tokenize | Detokenize | Embed | Evaluate


# --- worker to front end -------------------------------------------------------------------------------------


class ModelInfo(Struct, tag="model", kw_only=True):
    """What the GGUF says of itself; the chat template is untrusted input."""

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
    pooling: Pooling = "mean"  # of its embeddings; rank: it has scores for /v1/rerank instead
    fim: tuple[str, str, str] | None = None  # what stands before a text, its suffix, and the middle to be filled in
    sampling: dict[str, int | float] = field(
        default_factory=dict
    )  # its defaults by the names of Sampling, and max_tokens
    build: str  # llama.cpp's system info line
    placed: Placed | None = None  # None: there is no accelerator, or llama-server did not place it


class Loading(Struct, tag="loading"):
    progress: float  # 0 to 1


class Ready(Struct, tag="ready", kw_only=True):
    """Sent when a first token has been computed: the model answers."""

    model: ModelInfo
    settings: EngineSettings  # in force, with threads resolved
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
    """The prompt was tokenised and got a slot. Sent before it is computed: if that ends the worker, it is known."""

    id: int
    prompt_tokens: int
    cached_tokens: int  # of these, found in the KV cache


class Delta(Struct, tag="delta", kw_only=True):
    """New text: whole UTF-8 characters, nothing that may yet become a stop string. May be empty with n_tokens 1."""

    id: int
    text: str
    n_tokens: int
    logprobs: list[TokenLogprob] | None = None


class Finished(Struct, tag="finished", kw_only=True):
    """The end of a request that went well; `prompt_s` and `decode_s` are wall times in the engine."""

    id: int
    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prompt_s: float
    decode_s: float
    stop: str | None = None  # the stop string that ended it
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of the drafted ones


class Failed(Struct, tag="failed"):
    """The end of a request, a retune or a call that did not go well."""

    id: int
    code: ErrorCode
    message: str
    param: str | None = None
    details: dict[str, int] | None = None


class Stats(Struct, kw_only=True):
    """The worker's state after a step. `overhead_s` is the step's time outside llama_decode and native sampling."""

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
    preemptions: int  # for want of KV cells; since the start, as are those below
    cached_tokens: int
    prompt_tokens: int
    cached_memory_tokens: int = 0  # of the cached ones: from prompts that had left their slots
    cached_disk_tokens: int = 0
    prompt_evictions: int = 0
    prompt_bytes: int = 0  # of prompts that have left their slots, now
    prompt_limit_bytes: int = 0
    drafted_tokens: int = 0  # since the start
    accepted_tokens: int = 0
    slots_taken: int = 0  # from preemptible requests, for others


class Step(Struct, tag="step"):
    """All that one turn of the loop has to say; an idle worker sends one each second as its heartbeat."""

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
    pieces: list[bytes] = field(default_factory=list)  # where they were asked for, instead of the text


class Embedded(Struct, tag="embedded"):
    """For each input a vector of f32 numbers, native, of length 1 (Euclidean); where a query was given, its score."""

    id: int
    vectors: list[bytes]
    tokens: int  # of all inputs


FromWorker = Loading | Ready | Started | Step | Retuned | Tokens | Text | Embedded | Evaluated | Failed
