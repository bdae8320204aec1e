"""Checks which llama-server flags an operator may add to those that the settings produce."""

from __future__ import annotations

from collections.abc import Sequence

# Flags, by all their names, that the settings control or that the connection to llama-server depends on. Flags for
# speculative decoding are allowed: llama-server has methods that no setting covers, and uses a flag's last occurrence.
OWNED = frozenset(
    f"-{flag}"
    for line in (
        "m -model mu -model-url dr -docker-repo hf hfr -hf-repo hff -hf-file -models-dir -models-preset a -alias",
        "-chat-template -chat-template-file -lora -lora-scaled",
        "-rpc mm -mmproj mmu -mmproj-url ngl -gpu-layers -n-gpu-layers fit -fit -offline",
        "ncmoe -n-cpu-moe dev -device sm -split-mode ts -tensor-split mg -main-gpu lm -load-mode -numa",
        "-host -port -reuse-port -api-prefix -api-key -api-key-file -ssl-key-file -ssl-cert-file -threads-http",
        "c -ctx-size np -parallel b -batch-size ub -ubatch-size ctk -cache-type-k ctv -cache-type-v fa -flash-attn",
        "kvu -kv-unified no-kvu -no-kv-unified -kv-unified-per-slot t -threads tb -threads-batch",
        "-slots -no-slots -ui -webui -no-ui -no-webui -path",
        "-log-colors lv -verbosity -log-verbosity -log-jsonl -no-log-jsonl",
        "h -help -usage -version",
    )
    for flag in line.split()
)


# Flags that have no effect here, each with the reason.
_INEFFECTIVE = {
    "--sleep-idle-seconds": "llama-server is never idle here, because its slots are polled every second",
    **dict.fromkeys(
        ("--models-max", "--models-autoload", "--no-models-autoload"),
        "one llama-server serves one model: list others in llamaherd_more_models",
    ),
    **dict.fromkeys(
        ("--tools", "--tools-runtime", "--mcp-servers-config", "--mcp-servers-json", "--ui-mcp-proxy", "--agent"),
        "its web UI and tools are not reachable through this server",
    ),
    **dict.fromkeys(
        ("--cors-origins", "--cors-methods", "--cors-headers", "--cors-credentials"),
        "browsers connect to this server: set http.cors_origins",
    ),
    "--media-path": "requests cannot name files: send media in the request",
    "--slot-save-path": "requests cannot save slots: set llamaherd_server_limits.prompt_cache_mib to keep prompts",
    "--reasoning-format": "this server parses replies: set reasoning_format in requests",
    "--props": "change settings by PUT /admin/engine",
}


def check_extra_args(arguments: Sequence[str]) -> None:
    """Raise ValueError for a flag that the server sets itself, or that would have no effect."""
    for argument in arguments:
        name = argument.partition("=")[0]
        if name in OWNED:
            raise ValueError(f"{name} is set by the server: remove it and use the setting for it")
        if reason := _INEFFECTIVE.get(name):
            raise ValueError(f"{name} has no effect here: {reason}; remove it")
