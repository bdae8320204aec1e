"""One host with two models, each on its own engine, and then with two instances of the server."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.lab.conftest import ROOT, Herd
from tests.lab.test_engine_llama_server import client, programs, variables

pytestmark = [
    pytest.mark.lab,
    pytest.mark.fleet,
    pytest.mark.timeout(3600),
    pytest.mark.parametrize("herd", ["trixie"], indirect=True),
]

READ = 'from urllib.request import urlopen; print(urlopen("http://127.0.0.1:{}/metrics").read().decode())'
SMALL = {"parallel": 2, "ctx_per_slot": 1024, "batch": 256, "ubatch": 128}


def two_models(**second: Any) -> dict[str, Any]:
    """SmolLM2 twice: `ours` on the embedded engine, `theirs` on llama-server."""
    [model] = yaml.safe_load((ROOT / "roles/common/defaults/main.yml").read_text())["llamaherd_models"]
    theirs = {**model, "name": "theirs", "aliases": ["other"], "engine": "llama-server", "settings": {"parallel": 1}}
    return {
        "llamaherd_models": [{**model, "name": "ours"}, {**theirs, **second}],
        "llamaherd_more_models": ["theirs"],
        "llamaherd_settings": SMALL,
    }


def metrics(herd: Herd, port: int = 8080) -> str:
    return herd.sh("t1", f"python3 -c '{READ.format(port)}'")


def named(herd: Herd, model: str) -> tuple[int, Any]:
    answer = client(herd).request("POST", "/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 2})
    return answer.status, answer.json()


def test_two_models_are_deployed_and_a_second_deploy_changes_nothing(herd: Herd) -> None:
    herd.succeed("deploy.yml", *variables(**two_models()))
    assert herd.succeed("deploy.yml", *variables(**two_models())).changed["t1"] == 0
    assert herd.sh("t1", "ls /var/lib/llamaherd/models/*.gguf | wc -l") == "3\n"  # two names for one file


def test_they_verify(herd: Herd) -> None:
    herd.succeed("verify.yml", *variables(**two_models()))


@pytest.mark.parametrize(("asked", "answers"), [("ours", "ours"), ("theirs", "theirs"), ("other", "theirs")])
def test_a_request_goes_to_the_model_that_it_names(herd: Herd, asked: str, answers: str) -> None:
    status, answer = named(herd, asked)
    assert (status, answer["model"]) == (200, answers)


def test_an_unknown_name_is_a_404_that_lists_what_there_is(herd: Herd) -> None:
    status, answer = named(herd, "nope")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "'ours', 'theirs'" in answer["error"]["message"]


def test_one_of_them_is_loaded_when_it_is_asked_for(herd: Herd) -> None:
    asked = variables(**two_models(residence="on_demand", memory_share=0.5))
    herd.succeed("deploy.yml", *asked)
    herd.succeed("verify.yml", *asked)
    assert 'llamaherd_loaded{model="theirs"} 0.0' in metrics(herd)
    assert named(herd, "theirs")[0] == 200
    assert 'llamaherd_loaded{model="theirs"} 1.0' in metrics(herd)


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        pytest.param({"engine": "embedded", "extra_args": ["--x"]}, "extra_args needs the engine", id="engine"),
        pytest.param({"aliases": ["ours"]}, "the name ours is given to two", id="name"),
        pytest.param({"memory_share": 1.5}, "memory_share is 1.5", id="share"),
        pytest.param({"memory_share": 0.001}, "theirs with parallel 1", id="too small a share"),
        pytest.param({"mmproj": "eye"}, "does not list its mmproj eye", id="projector"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_changes_nothing(
    herd: Herd, second: dict[str, Any], expected: str
) -> None:
    run = herd.play("deploy.yml", *variables(**two_models(**second)))
    assert run.rc != 0
    assert run.changed["t1"] == 0
    assert len(run.errors) == 1
    assert expected in run.errors[0]


MORE = {"name": "two", "port": 8082, "devices": "1", "settings": {"parallel": 1}}
INSTANCES = {"llamaherd_settings": SMALL, "llamaherd_server_devices": "0", "llamaherd_instances": [MORE]}


def test_two_instances_are_deployed_and_a_second_deploy_changes_nothing(herd: Herd) -> None:
    herd.succeed("deploy.yml", *variables(**INSTANCES))
    assert herd.sh("t1", "systemctl is-active llamaherd-server llamaherd-server-two").split() == ["active"] * 2
    assert herd.succeed("deploy.yml", *variables(**INSTANCES)).changed["t1"] == 0


def test_each_has_its_gpu_and_its_settings_and_both_verify(herd: Herd) -> None:
    for unit, gpu in (("llamaherd-server", 0), ("llamaherd-server-two", 1)):
        environment = herd.sh("t1", f"tr '\\0' '\\n' </proc/$(systemctl show -P MainPID {unit})/environ")
        assert f"CUDA_VISIBLE_DEVICES={gpu}\n" in environment
    herd.succeed("verify.yml", *variables(**INSTANCES))


def test_nginx_balances_over_them_and_goes_on_with_one(herd: Herd) -> None:
    for _ in range(4):
        assert named(herd, "smollm2-135m-instruct")[0] == 200
    for port in (8080, 8082):
        assert "\nllamaherd_generations_total{" in metrics(herd, port)
    herd.sh("t1", "systemctl stop llamaherd-server")
    assert named(herd, "smollm2-135m-instruct")[0] == 200
    herd.sh("t1", "systemctl start llamaherd-server")


def test_an_instance_that_is_no_longer_listed_is_removed(herd: Herd) -> None:
    herd.succeed("deploy.yml", *variables(llamaherd_settings=SMALL))
    assert "server-two" not in herd.sh("t1", "ls /etc/systemd/system /etc/llamaherd; systemctl list-units 'llamaherd*'")
    assert len([line for line in programs(herd) if "-m llamaherd_server " in line]) == 1


def test_reset_removes_all_instances(herd: Herd) -> None:
    herd.succeed("deploy.yml", *variables(**INSTANCES))
    herd.succeed("reset.yml", *variables(skip_confirmation=True, **INSTANCES))
    assert herd.sh("t1", "ls -d /etc/systemd/system/llamaherd* /etc/llamaherd 2>/dev/null || true") == ""
