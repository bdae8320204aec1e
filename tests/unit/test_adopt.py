"""An existing llama-server unit, read as llamaherd's variables."""

from __future__ import annotations

from types import ModuleType

# As guides write it: continued lines, short and long flags, a negative number, flags that have no counterpart.
UNIT = """\
# /etc/systemd/system/llama-server.service
[Service]
Environment=LLAMA_ARG_THREADS=6 "LLAMA_API_KEY=sk-secret"
ExecStart=/opt/llama.cpp/llama-server \\
  --model /opt/models/Mistral-7B-Instruct-v0.2.Q5_K_M.gguf \\
  --host 0.0.0.0 --port 8081 \\
  -c 8192 -np 4 --n-gpu-layers 35 -b 1024 --ubatch-size=256 \\
  -ctk q8_0 --cache-type-v q8_0 -fa on --cont-batching --seed -1 --mlock
Restart=on-failure
"""


def test_flags_become_variables(llama_server_filters: ModuleType) -> None:
    adopted = llama_server_filters.adopt_llama_server(UNIT)
    left = {item["flag"]: item["reason"] for item in adopted.pop("left")}
    assert adopted == {
        "path": "/opt/models/Mistral-7B-Instruct-v0.2.Q5_K_M.gguf",
        "name": "mistral-7b-instruct-v0.2.q5_k_m",
        "port": 8081,
        "gpu_layers": 35,
        "ctx_size": 8192,
        "parallel": 4,
        "settings": {
            "batch": 1024,
            "ubatch": 256,
            "kv_type_k": "q8_0",
            "kv_type_v": "q8_0",
            "flash_attention": "on",
            "threads": 6,
        },
    }
    assert set(left) == {"--host", "--cont-batching", "--seed", "--mlock", "LLAMA_API_KEY"}
    assert left["--seed"] == "not taken over: was -1"
    assert "sk-secret" not in str(left)


def test_a_drop_in_goes_before_the_unit(llama_server_filters: ModuleType) -> None:
    unit = UNIT + "\n[Service]\nExecStart=\nExecStart=/usr/bin/llama-server -m /m/other.gguf -no-kvu\n"
    adopted = llama_server_filters.adopt_llama_server(unit)
    assert (adopted["path"], adopted["port"]) == ("/m/other.gguf", 8080)
    assert adopted["settings"] == {"threads": 6, "kv_unified": False}
