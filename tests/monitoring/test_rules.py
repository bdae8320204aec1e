"""The rules: promtool's own tests of them, and that those leave no alert out."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.debian import need
from tests.monitoring.prometheus import rules

pytestmark = pytest.mark.needs("promtool")

CASES = Path(__file__).with_name("rules.test.yml")


def promtool(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """promtool's tests of `text` as the rules."""
    (folder / "rules.yml").write_text(text)
    (folder / "cases.yml").write_text(CASES.read_text())
    command = [need("promtool"), "test", "rules", "cases.yml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(rules())["groups"] for rule in group["rules"] if "alert" in rule]


def test_the_rules_do_what_their_tests_say(tmp_path: Path) -> None:
    done = promtool(tmp_path, rules())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [alert["alert"] for alert in alerts()])
def test_an_alert_is_seen_to_fire_and_to_be_silent(name: str) -> None:
    cases = [
        case
        for test in yaml.safe_load(CASES.read_text())["tests"]
        for case in test.get("alert_rule_test", [])
        if case["alertname"] == name
    ]
    assert {bool(case["exp_alerts"]) for case in cases} == {True, False}


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_says_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"warning", "critical"}
    assert set(alert["annotations"]) == {"summary", "remedy"}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("up == 0", "up == 1"), ("0.95, sum by (model, le)", "0.5, sum by (model, le)"), ("for: 10m", "for: 1m")],
)
def test_a_changed_rule_fails_its_tests(tmp_path: Path, right: str, wrong: str) -> None:
    assert right in rules()
    assert promtool(tmp_path, rules().replace(right, wrong)).returncode != 0
