"""`llamaherd-server keys`: what it writes is what the server reads, and nothing else in the file moves."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llamaherd_server.config.keys import KeyStore
from llamaherd_server.keyfile import add, revoke

from .conftest import Serve
from .double import Double

BY_HAND = """# the team's keys

# Ada's, until she leaves
[[keys]]
name = "ada"
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"

# the tuner
[[keys]]
name = "tuner"
sha256 = "1111111111111111111111111111111111111111111111111111111111111111"
admin = true
"""


def keys(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llamaherd_server", "keys", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(BY_HAND)
    path.chmod(0o640)
    return path


def test_a_key_is_shown_once_and_its_hash_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    made = keys(
        *("--file", path, "add", "team-a", "--requests-per-minute", "60", "--tokens-per-minute", "1e4"),
        *(
            "--max-concurrent",
            "4",
            "--model",
            "small",
            "--model",
            "large",
            "--expires",
            "2099-01-31",
            "--priority",
            "2",
            "--preemptible",
        ),
    )
    secret = made.stdout.strip()
    assert len(secret) > 40
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    key = KeyStore(path).find(secret)
    assert key is not None
    assert (key.name, key.requests_per_minute, key.tokens_per_minute, key.max_concurrent) == ("team-a", 60, 1e4, 4)
    assert (key.models, key.priority, key.preemptible, key.admin) == (["small", "large"], 2, True, False)
    assert key.expires is not None
    assert key.expires.isoformat() == "2099-01-31T00:00:00+00:00"
    listed = keys("--file", path, "list").stdout
    assert "team-a" in listed
    assert "small,large" in listed
    assert hashlib.sha256(secret.encode()).hexdigest() not in made.stdout + listed


def test_what_a_person_wrote_stays(path: Path) -> None:
    add(path, {"name": "new"})
    assert path.read_text().startswith(BY_HAND)
    revoke(path, "ada")
    text = path.read_text()
    assert "Ada" not in text
    assert text.startswith("# the team's keys\n\n# the tuner\n[[keys]]\n")
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in path.parent.iterdir()] == ["keys.toml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("add", "ada"), "two keys have the same name, 'ada'"),
        (("add", "a b"), "use up to 64 letters"),
        (("add", "b", "--priority", "1000"), "priority 1000.0 must be between"),
        (("add", "b", "--max-concurrent", "0"), "max_concurrent 0 must be above 0"),
        (("revoke", "eve"), "unknown key 'eve'; available: ada, tuner"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = keys("--file", path, *arguments)
    assert done.returncode == 78
    assert message in done.stderr
    assert (done.stderr.count("\n"), path.read_text()) == (1, BY_HAND)
    assert [entry.name for entry in path.parent.iterdir()] == ["keys.toml"]


def test_the_last_key_can_be_revoked_and_a_new_one_added(path: Path) -> None:
    for name in ("ada", "tuner"):
        assert keys("--file", path, "revoke", name).returncode == 0
    assert path.read_text().splitlines()[:2] == ["keys = []", "# the team's keys"]
    assert keys("--file", path, "list").stdout.count("\n") == 1
    secret = add(path, {"name": "new"})
    assert path.read_text().splitlines()[:3] == ["# the team's keys", "", "[[keys]]"]
    assert KeyStore(path).find(secret) is not None


def test_writers_at_the_same_time_lose_nothing(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        secrets = list(pool.map(lambda number: add(path, {"name": f"k{number}"}), range(32)))
    store = KeyStore(path)
    assert [key.name for secret in secrets if (key := store.find(secret))] == [f"k{number}" for number in range(32)]


async def test_a_running_server_knows_at_once(serve: Serve) -> None:
    async with serve(Double(), keys=BY_HAND) as served:
        path = served.state.settings.auth.keys_file
        assert path is not None
        headers = {"Authorization": f"Bearer {add(path, {'name': 'new'})}"}
        assert (await served.http.get("/v1/models", headers=headers)).status_code == 200
        assert (await served.http.get("/admin/engine", headers=headers)).status_code == 403
        revoke(path, "new")
        assert (await served.http.get("/v1/models", headers=headers)).status_code == 401


async def test_without_a_key_left_nobody_is_let_in(serve: Serve) -> None:
    async with serve(Double(), keys=BY_HAND) as served:
        path = served.state.settings.auth.keys_file
        assert path is not None
        headers = {"Authorization": f"Bearer {add(path, {'name': 'new'})}"}
        for name in ("ada", "tuner", "new"):
            assert (await served.http.get("/v1/models", headers=headers)).status_code == 200
            revoke(path, name)
        assert (await served.http.get("/v1/models", headers=headers)).status_code == 401
        assert (await served.http.get("/v1/models")).status_code == 401
