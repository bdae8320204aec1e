"""A host whose Vulkan driver computes on the CPU (Mesa's lavapipe): all that a deploy does with a GPU, really done.

llama.cpp's Vulkan backend is built and run; what a card alone has (a render node, memory of its own) is not here.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import LEFT, Herd
from tests.lab.test_engine_llama_server import client, variables
from tests.random_models import RandomModel

pytestmark = [
    pytest.mark.lab,
    pytest.mark.fleet,
    pytest.mark.timeout(3600),  # the shaders alone compile for minutes
    pytest.mark.parametrize("herd", ["trixie"], indirect=True),  # Debian 12's headers are too old
]

LAYERS = 6
OFFLOADABLE = LAYERS + 1  # the output's is one
UNIT = "/etc/systemd/system/llamaherd-server.service"
BIN = "/opt/llamaherd/llama.cpp/current/bin"


def entry(name: str, path: Path) -> dict[str, Any]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"name": name, "sha256": digest, "source": {"kind": "file", "path": str(path)}}


def deployed(**more: Any) -> tuple[str, str]:
    models = [
        entry("tiny", RandomModel("dense", LAYERS).path()),
        entry("experts", RandomModel("mixture", LAYERS).path()),
    ]
    given = {
        "llamaherd_accelerator": "vulkan",
        "llamaherd_server_devices": "0",
        "llamaherd_models": models,
        "llamaherd_settings": {"parallel": 2, "ctx_per_slot": 1024, "batch": 256, "ubatch": 128},
    }
    return variables(**given | more)


ASK = """python3 - <<'END'
import json, urllib.request as u
body = {body!r}
request = u.Request("http://127.0.0.1:8080/admin/engine", body.encode() or None, method="PUT" if body else "GET")
request.add_header("Authorization", "Bearer {key}")
request.add_header("Content-Type", "application/json")
try:
    print(u.urlopen(request).read().decode())
except u.HTTPError as error:
    print(error.read().decode())
END"""


def engine(herd: Herd, **settings: Any) -> Any:
    """What /admin/engine says, once these settings were asked for."""
    key = (herd.inventory / ".secrets/keys/admin").read_text().strip()
    body = json.dumps(settings) if settings else ""
    return json.loads(herd.sh("t1", ASK.format(body=body, key=key), timeout_s=300))


def placed(herd: Herd) -> tuple[int, int, int]:
    found = engine(herd)["placement"]
    return found["gpu_layers"], found["layers"], found["partial_layers"]


def offloaded(herd: Herd) -> str:
    """What the journal last said of it."""
    return herd.sh("t1", "journalctl -u llamaherd-server | grep -o 'offloaded .* layers' | tail -1").strip()


def answers(herd: Herd, model: str = "tiny") -> str:
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    answer = client(herd).request("POST", "/v1/completions", body)
    assert answer.status == 200, answer.body
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_auto_does_not_take_a_driver_that_computes_on_the_cpu(herd: Herd) -> None:
    herd.sh("t1", "apt-get update -q && apt-get install -y -q --no-install-recommends mesa-vulkan-drivers", 300)
    run = herd.succeed("deploy.yml", "--check", *deployed(llamaherd_accelerator="auto", llamaherd_server_devices=""))
    assert "0.3.36-cpu-" in run.output


def test_it_has_to_be_named(herd: Herd) -> None:
    run = herd.play("deploy.yml", *deployed(llamaherd_server_devices=""))
    assert run.rc != 0
    assert 'or llamaherd_server_devices to "0" for a Vulkan driver that computes on the CPU' in run.errors[0]
    assert herd.sh("t1", LEFT).strip() == ""


def test_all_layers_are_on_the_device(herd: Herd) -> None:
    run = herd.succeed("deploy.yml", *deployed())
    assert f"tiny: {OFFLOADABLE} of {OFFLOADABLE} layers are on the accelerator (vulkan)" in run.output
    assert placed(herd) == (OFFLOADABLE, OFFLOADABLE, 0)
    assert answers(herd)


def test_a_second_deploy_changes_nothing(herd: Herd) -> None:
    assert herd.succeed("deploy.yml", *deployed()).changed["t1"] == 0


def test_verify(herd: Herd) -> None:
    herd.succeed("verify.yml", *deployed())


def test_the_sandbox_lets_the_driver_compute_and_opens_nothing_else(herd: Herd) -> None:
    """With the rights that the unit has, which its whole sandbox may take away again."""
    sandbox = f"sed -n '/^CapabilityBoundingSet=/,/^SystemCallErrorNumber=/s/^[A-Z]/-p\\n&/p' {UNIT}"
    command = f"export GGML_VK_VISIBLE_DEVICES=0; {BIN}/llama-server --list-devices; ! true </dev/fuse"
    run = "xargs -d '\\n' systemd-run --quiet --wait --pipe -p User=llamaherd -p Group=llamaherd </tmp/sandbox"
    output = herd.sh("t1", f"{sandbox} >/tmp/sandbox; printf 'sh\\n-ec\\n{command}\\n' >>/tmp/sandbox; {run}")
    assert "Vulkan0: llvmpipe" in output


@pytest.mark.parametrize("kind", ["embedded", "llama-server"])
@pytest.mark.parametrize(("layers", "on"), [(3, 3), (0, 0), ("auto", OFFLOADABLE)])
def test_some_layers_none_and_as_many_as_fit(herd: Herd, kind: str, layers: int | str, on: int) -> None:
    herd.succeed("deploy.yml", *deployed(llamaherd_engine=kind, llamaherd_placement={"gpu_layers": layers}))
    assert engine(herd)["engine"] == kind
    assert offloaded(herd) == f"offloaded {on}/{OFFLOADABLE} layers"
    if kind == "embedded" or layers == "auto":  # else llama-server does not say it by itself
        assert placed(herd) == (on, OFFLOADABLE, 0)
    assert answers(herd)


def test_experts_stay_with_the_cpu(herd: Herd) -> None:
    served = {"llamaherd_model": "experts", "llamaherd_engine": "embedded"}
    herd.succeed("deploy.yml", *deployed(**served))
    everything, device = answers(herd, "experts"), device_mib(herd)
    herd.succeed("deploy.yml", *deployed(**served, llamaherd_placement={"cpu_moe_layers": LAYERS}))
    assert placed(herd) == (OFFLOADABLE, OFFLOADABLE, LAYERS)
    assert answers(herd, "experts") == everything
    assert device_mib(herd, "--n-cpu-moe", str(LAYERS)) < device


def device_mib(herd: Herd, *flags: str) -> int:
    """What llama.cpp says that the weights take on the device."""
    model = "/var/lib/llamaherd/models/experts.gguf"
    command = f"GGML_VK_VISIBLE_DEVICES=0 {BIN}/llama-fit-params -m {model} -c 2048 {' '.join(flags)} --fit-print on"
    [line] = [line for line in herd.sh("t1", command).splitlines() if line.startswith("Vulkan0")]
    return int(line.split()[1])


def test_a_context_that_does_not_fit_the_device_is_refused_and_the_former_serves(herd: Herd) -> None:
    before = engine(herd)["settings"]
    refused = engine(herd, ctx_per_slot=2**23)
    assert refused["error"]["code"] == "does_not_fit"
    assert engine(herd)["settings"] == before
    assert answers(herd, "experts")


def test_reset_leaves_nothing_behind(herd: Herd) -> None:
    herd.succeed("reset.yml", *deployed(skip_confirmation=True))
    assert herd.sh("t1", LEFT).strip() == ""
