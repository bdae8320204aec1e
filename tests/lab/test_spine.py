"""The main job on one real host, in the order in which an operator meets it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from tests.lab.conftest import LEFT, Herd
from tests.lab.test_engine_llama_server import client
from tests.unit.conftest import checker

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3600)]


def test_check_mode_works_on_a_virgin_host_and_touches_nothing(herd: Herd) -> None:
    herd.succeed("deploy.yml", "--check")
    assert herd.sh("t1", "ls /opt /etc/llamaherd /var/lib/llamaherd 2>/dev/null || true").strip() in ("", "/opt:")
    assert "llamaherd" not in herd.sh("t1", "cat /etc/passwd")


def test_deploy(herd: Herd) -> None:
    herd.succeed("deploy.yml")
    assert herd.sh("t1", "systemctl is-active llamaherd-server nginx").split() == ["active", "active"]


def test_a_second_deploy_changes_nothing(herd: Herd) -> None:
    assert herd.succeed("deploy.yml").changed["t1"] == 0


def test_check_mode_on_a_deployed_host_would_change_nothing(herd: Herd) -> None:
    assert herd.succeed("deploy.yml", "--check").changed["t1"] == 0


def test_verify(herd: Herd) -> None:
    herd.succeed("verify.yml")


def test_a_prompt_is_warm_after_a_restart(herd: Herd) -> None:
    body = {"model": "smollm2-135m-instruct", "prompt": " ".join(map(str, range(60))), "max_tokens": 2}

    def cached() -> tuple[int, int]:
        usage = client(herd).request("POST", "/v1/completions", body).json()["usage"]
        return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]

    assert cached()[1] == 0
    herd.sh("t1", "systemctl restart llamaherd-server", timeout_s=120)
    tokens, found = cached()
    assert found == tokens - 1
    folders = herd.sh("t1", "cd /var/lib/llamaherd/prompts && stat -c '%a %U' . server").split()
    assert folders == ["700", "llamaherd"] * 2


AGAIN = 'again() { for link; do ln -sfn "$(readlink "$link")" "$link"; done; }'


@pytest.mark.parametrize(
    "cut_off",
    [
        pytest.param("touch /etc/llamaherd/server.toml", id="settings"),
        pytest.param("touch /etc/systemd/system/llamaherd-server.service", id="unit", marks=pytest.mark.fleet),
        pytest.param(f"{AGAIN}; cd /opt/llamaherd/server && again current", id="release", marks=pytest.mark.fleet),
        pytest.param(
            f"{AGAIN}; cd /var/lib/llamaherd/models && again *instruct.gguf", id="model", marks=pytest.mark.fleet
        ),
    ],
)
def test_a_change_whose_restart_never_came_is_made_up_for(herd: Herd, cut_off: str) -> None:
    """A play that is cut off between the two leaves what it wrote, newer than the process that should have read it."""
    herd.sh("t1", cut_off)
    since = "systemctl show -P ExecMainStartTimestampMonotonic llamaherd-server"
    before = herd.sh("t1", since)
    herd.succeed("deploy.yml", "--tags", "config")
    assert herd.sh("t1", since) != before
    assert herd.succeed("deploy.yml", "--tags", "config").changed["t1"] == 0


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        pytest.param({"llamaherd_accelerator": "cdua"}, "cdua", id="unknown accelerator"),
        pytest.param({"llamaherd_paralel": 4}, "llamaherd_paralel", id="misspelt variable"),
        pytest.param({"llamaherd_settings": {"parallel": 256, "ctx_per_slot": 1000000}}, "GiB", id="beyond the memory"),
        pytest.param({"llamaherd_settings": {"parallel": 0}}, "parallel 0 is out of range", id="impossible setting"),
        pytest.param({"llamaherd_server_port": 22}, "22", id="port taken"),
        pytest.param({"llamaherd_model": "nope"}, "nope", id="unknown model"),
    ],
)
def test_bad_input_is_one_clear_line_and_changes_nothing(
    herd: Herd, variables: dict[str, object], expected: str
) -> None:
    run = herd.play("deploy.yml", "-e", json.dumps(variables))
    assert run.rc != 0
    assert run.changed["t1"] == 0
    assert len(run.errors) == 1
    assert expected in run.errors[0]


@pytest.mark.parametrize(
    ("content", "sha256", "expected"),
    [
        pytest.param(b"GGUF but not what was promised", "0" * 64, "0" * 64, id="sha256 mismatch"),
        pytest.param(b"plain text", None, "GGUF", id="no GGUF"),
    ],
)
def test_a_bad_model_never_replaces_the_good_one(
    herd: Herd, tmp_path_factory: pytest.TempPathFactory, content: bytes, sha256: str | None, expected: str
) -> None:
    model = tmp_path_factory.mktemp("model") / "bad.gguf"
    model.write_bytes(content)
    entry = {
        "name": "bad",
        "source": {"kind": "file", "path": str(model)},
        "sha256": sha256 or hashlib.sha256(content).hexdigest(),
    }
    before = herd.sh("t1", "cat /etc/llamaherd/server.toml; ls /var/lib/llamaherd/models")
    run = herd.play("deploy.yml", "-e", json.dumps({"llamaherd_models": [entry], "llamaherd_model": "bad"}))
    assert run.rc != 0
    assert len(run.errors) == 1
    assert expected in run.errors[0]
    assert herd.sh("t1", "cat /etc/llamaherd/server.toml; ls /var/lib/llamaherd/models") == before
    assert herd.sh("t1", "systemctl is-active llamaherd-server").strip() == "active"


def test_an_unreachable_host_is_one_clear_line(herd: Herd) -> None:
    run = herd.play("deploy.yml", "-e", "ansible_host=198.18.0.99", "-e", "ansible_ssh_timeout=3")
    assert run.rc != 0
    assert "unreachable" in run.output.lower()
    assert "198.18.0.99" in run.output


@pytest.fixture
def chooser(tmp_path: Path) -> str:
    """A tuner that measures nothing and always chooses parallel 3; what it writes is all that tune.yml reads."""
    settings = {"parallel": 3, "batch": 2048, "ubatch": 512, "ctx_per_slot": 2048, "kv_unified": True}
    verdict = {
        "verdict": "change",
        "sentence": "Take parallel 3.",
        "chosen": settings,
        "limits": {},
        "provenance": {"model": "smollm2-135m-instruct"},
    }
    (tmp_path / "verdict.json").write_text(json.dumps(verdict))
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\nfor word; do case $word in --out=*) cp "
        + str(tmp_path / "verdict.json")
        + ' "${word#--out=}/verdict.json"; esac; done\n'
    )
    script.chmod(0o755)
    return str(script)


DROP_IN = "/run/systemd/system/llamaherd-server.service.d/other.conf"


def test_chosen_settings_that_do_not_verify_are_taken_back(herd: Herd, chooser: str) -> None:
    tuned = herd.inventory / "host_vars/t1/tuned.yml"
    before = herd.sh("t1", "cat /etc/llamaherd/server.toml")
    # Something on the host overrides what is deployed, so that other settings are in force than the inventory says.
    herd.sh(
        "t1",
        f"mkdir -p {DROP_IN.rpartition('/')[0]} && "
        f"printf '[Service]\\nEnvironment=LLAMAHERD_ENGINE__PARALLEL=2\\n' > {DROP_IN} && systemctl daemon-reload",
    )
    try:
        run = herd.play("tune.yml", "-e", f"llamaherd_loadgen_python={chooser}")
    finally:
        herd.sh("t1", f"rm {DROP_IN} && systemctl daemon-reload && systemctl restart llamaherd-server")
    assert run.rc != 0
    assert "its former settings are restored" in run.output
    assert not tuned.exists()
    assert herd.sh("t1", "cat /etc/llamaherd/server.toml") == before


def test_chosen_settings_are_written_deployed_and_verified(herd: Herd, chooser: str) -> None:
    tuned = herd.inventory / "host_vars/t1/tuned.yml"
    herd.succeed("tune.yml", "-e", f"llamaherd_loadgen_python={chooser}")
    assert "parallel: 3" in tuned.read_text()
    assert "parallel = 3" in herd.sh("t1", "cat /etc/llamaherd/server.toml")
    assert herd.succeed("deploy.yml").changed["t1"] == 0
    tuned.unlink()


@pytest.mark.fleet
def test_a_chosen_engine_is_written_deployed_and_verified(herd: Herd, chooser: str) -> None:
    path = Path(chooser).with_name("verdict.json")
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"chosen": {**found["chosen"], "engine": "llama-server"}}))
    herd.succeed("tune.yml", "-e", f"llamaherd_loadgen_python={chooser}")
    assert 'kind = "llama-server"' in herd.sh("t1", "cat /etc/llamaherd/server.toml")
    assert herd.sh("t1", "pgrep -c llama-server").strip() == "1"
    assert herd.succeed("deploy.yml").changed["t1"] == 0
    (herd.inventory / "host_vars/t1/tuned.yml").unlink()
    herd.succeed("deploy.yml", "--tags", "config")


def test_one_changed_setting_restarts_only_the_server(herd: Herd) -> None:
    before = herd.sh("t1", "systemctl show -P ActiveEnterTimestampMonotonic nginx llamaherd-server").split()
    herd.succeed("deploy.yml", "--tags", "config", "-e", json.dumps({"llamaherd_settings": {"parallel": 2}}))
    after = herd.sh("t1", "systemctl show -P ActiveEnterTimestampMonotonic nginx llamaherd-server").split()
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert "parallel = 2" in herd.sh("t1", "cat /etc/llamaherd/server.toml")


# As people write them: quotes, comments between continued lines, a template, a drop-in, files with more.
LLAMA_SERVER = """
mkdir -p /run/systemd/system/llama-server@one.service.d '/srv/llama/My Models'
ln -sf /var/lib/llamaherd/models/smollm2-135m-instruct.gguf '/srv/llama/My Models/Small one.gguf'
echo lora >/srv/llama/tone.gguf; echo eye >/srv/llama/eye.gguf
cat >/run/systemd/system/llama-server@.service <<'UNIT'
[Service]
WorkingDirectory=/srv/llama
Environment=LLAMA_ARG_THREADS=6 "LLAMA_API_KEY=sk-old"
EnvironmentFile=-/run/llama-%i
EnvironmentFile=-/run/llama-nothing*
ExecStart=/usr/bin/llama-server \\
  -m "My Models/Small %i.gguf" \\
  # as many as there are people
  -c 4096 -np 2 --port=${PORT} $EXTRA \\
  --cache-type-k=q8_0 -fa --mlock --mmproj eye.gguf --lora-scaled tone.gguf:0.5 --chat-template-file chat.jinja
UNIT
printf '[Service]\nEnvironment=LLAMA_ARG_THREADS=3\n' >/run/systemd/system/llama-server@one.service.d/threads.conf
printf 'PORT=8081\nEXTRA="-ub 256 --alias=small,mini"\n' >/run/llama-one
systemctl daemon-reload
"""


def test_adopt_prints_an_inventory_from_a_llama_server_unit(herd: Herd, tmp_path: Path) -> None:
    herd.sh("t1", LLAMA_SERVER)
    printed = tmp_path / "adopted.yml"
    unit = ["-e", "llamaherd_adopt_unit=llama-server@one.service"]
    run = herd.succeed("adopt.yml", *unit, "-e", f"llamaherd_adopt_file={printed}", "-v")
    assert run.changed["t1"] == 1  # the file here
    assert "sk-old" not in run.output
    variables = yaml.safe_load(printed.read_text())["all"]["children"]["inference"]["vars"]
    assert variables["llamaherd_settings"] == {
        **{"parallel": 2, "ctx_per_slot": 2048, "kv_unified": False, "ubatch": 256},
        **{"kv_type_k": "q8_0", "flash_attention": "on", "threads": 3},
    }
    assert variables["llamaherd_server_port"] == 8081
    assert variables["llamaherd_models"][0]["aliases"] == ["small", "mini"]
    model = variables["llamaherd_models"][0]
    assert model["sha256"] == herd.sh("t1", f"sha256sum '{model['source']['path']}'").split()[0]
    sums = [herd.sh("t1", f"sha256sum /srv/llama/{name}.gguf").split()[0] for name in ("tone", "eye")]
    assert [model["lora"][0]["sha256"], variables["llamaherd_models"][1]["sha256"]] == sums
    assert (model["mmproj"], model["lora"][0]["scale"]) == (variables["llamaherd_models"][1]["name"], 0.5)
    assert model["chat_template"] == "/srv/llama/chat.jinja"
    check = checker()
    known = check.known_variables()
    assert [line for name, value in variables.items() for line in check.mistakes(name, value, known[name])] == []
    assert "does not exist, or runs nothing" in herd.play("adopt.yml", "-e", "llamaherd_adopt_unit=none.service").output
    herd.sh("t1", "rm -r /run/systemd/system/llama-server@* /run/llama-one /srv/llama; systemctl daemon-reload")


def test_reset_leaves_nothing_behind(herd: Herd) -> None:
    herd.succeed("reset.yml", "-e", '{"skip_confirmation": true}')
    assert herd.sh("t1", LEFT).strip() == ""
