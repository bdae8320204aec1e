"""sudo with a password, of which testinfra knows nothing: the backend's sudo reads it from standard input."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest
    from testinfra.backend.base import BaseBackend, CommandResult


def give_password(backend: BaseBackend, password: str, patch: pytest.MonkeyPatch) -> None:
    def get_sudo_command(command: str, _user: str | None) -> str:
        return str(backend.quote("sudo -S -p '' /bin/sh -c %s", command))

    def run_local(command: str, *args: str) -> CommandResult:
        command = backend.quote(command, *args)
        done = subprocess.run(["sh", "-c", command], input=f"{password}\n".encode(), capture_output=True, check=False)
        return backend.result(done.returncode, command.encode(), done.stdout, done.stderr)

    patch.setattr(backend, "get_sudo_command", get_sudo_command)
    patch.setattr(backend, "run_local", run_local)
