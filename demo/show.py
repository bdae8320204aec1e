"""What the demo leaves: the table of settings, the report, a curl line that works as pasted, and build/demo.json."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from demo.stages import ROOT, StageFailed
from demo.tuning import measured

MODEL = "smollm2-135m-instruct"
Stages = list[dict[str, str | float]]


def lab(stages: Stages, inventory: Path) -> None:
    secrets = inventory / ".secrets"
    summarise("lab", stages, host="herd1", endpoint="https://198.18.0.11/v1", secrets=secrets, ca=secrets / "ca.crt")


def loopback(stages: Stages, port: int, left_out: str) -> None:
    secrets = ROOT / "inventories/loopback/.secrets"
    endpoint = f"http://127.0.0.1:{port}/v1"
    summarise("process", stages, host="localhost", endpoint=endpoint, secrets=secrets, left_out=left_out)


def summarise(
    mode: str,
    stages: Stages,
    *,
    host: str,
    endpoint: str,
    secrets: Path,
    ca: Path | None = None,
    left_out: str | None = None,
) -> None:
    folder = ROOT / "build/tune" / host
    verdict = json.loads((folder / "verdict.json").read_text())
    key_file = secrets / "keys/default"
    result = {
        "mode": mode,
        "left_out": left_out,
        "endpoint": endpoint,
        "ca_path": str(ca) if ca else None,
        "key": key_file.read_text().strip(),
        "settings": verdict["chosen"],
        "verdict": verdict["verdict"],
        "sentence": verdict["sentence"],
        "table": verdict["table"],
        "report": str(folder / "report.html"),
        "stages": stages,
        "curl": curl(endpoint, key_file, ca),
    }
    if not measured(folder):
        print(table(verdict["table"]))
        raise StageFailed("tuning measured no setting; a longer one may: make demo BUDGET=20m")
    print(summary(result))
    target = ROOT / "build/demo.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    target.chmod(0o600)


def summary(result: dict[str, Any]) -> str:
    """What a demo prints at its end, from what build/demo.json keeps of it."""
    stages = result["stages"]
    lines = [table(result["table"]), f"\n{result['sentence']}", f"\nreport  {result['report']}"]
    lines += [f"  {stage['seconds']:>6.0f} s  {stage['stage']}" for stage in stages]
    lines.append(f"  {sum(float(stage['seconds']) for stage in stages):>6.0f} s  in all")
    if result["left_out"]:
        lines.append(f"       -    systemd, nginx and TLS: left out, because {result['left_out']}")
    return "\n".join([*lines, f"\nTry it:\n\n{result['curl']}\n\n`make demo-down` removes it."])


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as in verdict.json; a figure that was never measured (not launched) is a dash."""
    head = ("setting", "tokens/s", "TTFT p95", "TPOT p95", "verdict")
    lines = [
        (
            row["label"],
            figure(row.get("output_tokens_per_s"), ".1f", ""),
            figure(row.get("ttft_p95_ms"), ".0f", " ms"),
            figure(row.get("tpot_p95_ms"), ".0f", " ms"),
            row["verdict"],
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    printed = [""]
    for line in [head, tuple("─" * width for width in widths), *lines]:
        cells = [
            cell.ljust(width) if i in (0, 4) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        printed.append("  ".join(cells).rstrip())
    return "\n".join(printed)


def figure(value: float | None, spec: str, unit: str) -> str:
    return "-" if value is None else f"{value:{spec}}{unit}"


def curl(endpoint: str, key_file: Path, ca: Path | None) -> str:
    # A model this small may not end by itself.
    hello = {"messages": [{"role": "user", "content": "Say hello to the herd."}], "max_tokens": 64}
    body = json.dumps({"model": MODEL, **hello})
    trust = f"--cacert {shlex.quote(str(ca))} " if ca else ""
    return (
        f"curl -sS {trust}{endpoint}/chat/completions \\\n"
        f'  -H "Authorization: Bearer $(cat {shlex.quote(str(key_file))})" \\\n'
        f"  -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(body)}"
    )
