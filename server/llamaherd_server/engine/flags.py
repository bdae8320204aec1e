"""The command line of llama-server, for the pinned version of llama.cpp."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

from llamaherd_server.wire.engine_settings import EngineSettings, Placement
from llamaherd_server.wire.protocol import NativeConfig
from llamaherd_server.worker.fit import context_arguments

_FLAG = re.compile(r"--?[A-Za-z][\w-]*")
_HELP_S = 60.0  # builds with a device backend enumerate devices first

_PLACEMENT_FLAGS = {
    **{"gpu_layers": "--gpu-layers", "cpu_moe_layers": "--n-cpu-moe", "devices": "--device"},
    **{"split_mode": "--split-mode", "tensor_split": "--tensor-split", "main_gpu": "--main-gpu"},
    **{"load_mode": "--load-mode", "numa": "--numa"},
}
NGRAM = 12  # length of the n-gram that llama-server looks up, its default
MTP_DEPTH = 3  # llama-server's default: each MTP head builds on the guess of the previous one
DRAFT_DEPTH, DRAFT_P_MIN = 16, 0.75  # a draft ends before the first token with a lower probability in the draft model


def flags(config: NativeConfig, socket: str) -> list[str]:
    """Return the arguments for a llama-server that listens on the Unix `socket`; it gets its key in LLAMA_API_KEY."""
    settings, fits = config.settings, config.placement.gpu_layers == "auto"
    arguments = {
        # first, because RPC servers become devices that later flags may name
        **({"--rpc": ",".join(config.rpc)} if config.rpc else {}),
        "--host": socket,
        "--model": config.path,
        "--alias": config.name,
        **_placement(config.placement),
        # settings that do not fit must fail; llama-server would otherwise change them
        "--fit": "on" if fits else "off",
        **context_arguments(settings),
        # each stream occupies a thread; tokenization and the heartbeat need more
        "--threads-http": 2 * settings.parallel + 8,
        "--log-colors": "off",
        "--log-verbosity": 4 if fits else 2,  # 4 is the lowest level that logs where layers were placed
    }
    if settings.kv_unified:
        arguments["--kv-unified-per-slot"] = settings.ctx_per_slot
    if settings.threads:
        arguments["--threads"] = settings.threads
    if settings.threads_batch:
        arguments["--threads-batch"] = settings.threads_batch
    arguments |= _speculative(settings, config.draft)
    if config.mmproj:
        arguments["--mmproj"] = config.mmproj
    if config.chat_template:
        arguments["--chat-template-file"] = config.chat_template
    if config.lora:
        arguments["--lora-scaled"] = ",".join(f"{one.path}:{one.scale}" for one in config.lora)
    switches = ["--kv-unified" if settings.kv_unified else "--no-kv-unified", "--slots", "--no-ui", "--offline"]
    switches += ["--log-jsonl"] * fits
    return [*(str(word) for pair in arguments.items() for word in pair), *switches, *config.extra_args]


def _speculative(settings: EngineSettings, draft: str | None) -> dict[str, object]:
    depth = settings.speculative_depth
    if settings.speculative == "off":
        return {}
    if settings.speculative == "mtp":
        return {"--spec-type": "draft-mtp", "--spec-draft-n-max": min(depth, MTP_DEPTH)}
    if settings.speculative == "draft":
        # a draft is meant to end by DRAFT_P_MIN before it reaches the maximum
        limits = {"--spec-draft-n-max": min(depth, DRAFT_DEPTH), "--spec-draft-p-min": DRAFT_P_MIN}
        return {"--spec-type": "draft-simple", "--spec-draft-model": draft, **limits}
    return {
        "--spec-type": "ngram-simple",
        "--spec-ngram-simple-size-n": min(depth, NGRAM),  # llama-server never drafts fewer tokens than it looks up
        "--spec-ngram-simple-size-m": depth,
    }


def unknown(arguments: Sequence[str], binary: str) -> list[str]:
    """Return the flags that `binary --help` does not list; raises ValueError if the help is unusable."""
    try:
        answer = subprocess.run([binary, "--help"], capture_output=True, text=True, timeout=_HELP_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{binary} --help: {error}") from None
    known = {flag for line in answer.stdout.splitlines() if line.startswith("-") for flag in _FLAG.findall(line)}
    if not known:
        raise ValueError(
            f"{binary} --help lists no flags: {answer.stderr.strip()[-300:] or f'exit code {answer.returncode}'}"
        )
    given = (argument.partition("=")[0] for argument in arguments)
    return [flag for flag in given if _FLAG.fullmatch(flag) and flag not in known]


def _placement(placement: Placement) -> dict[str, object]:
    """Return flags for values other than the default, and always --gpu-layers: llama-server's default is auto."""
    given: dict[str, object] = {}
    for name, flag in _PLACEMENT_FLAGS.items():
        value = getattr(placement, name)
        if value != getattr(Placement(), name):
            given[flag] = ",".join(map(str, value)) if isinstance(value, list) else value
    return {"--gpu-layers": "all", **given}
