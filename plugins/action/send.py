"""send: a large file from the controller to a host; documented in plugins/modules/send.py.

ansible.builtin.copy brings a file to the ssh user's ~/.ansible/tmp first, where a model may not fit. This one appends
to `dest` through the task's own connection and become, piece by piece, after it has seen that the rest fits. An
existing `dest` is taken for the beginning of the same file: the caller verifies the whole by its sha256. Of several
files none is begun unless all of them fit.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

CHUNK = 1 << 25  # more costs memory on the controller, less a round trip each
_LOOK = "test ! -e {dest} || wc -c <{dest}; echo; LC_ALL=C df -Pk {folder}"


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible is untyped
    _VALID_ARGS = frozenset({"src", "dest", "label", "interval"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        args, host = self._task.args, (task_vars or {}).get("inventory_hostname", "")
        try:
            sources = [self._source(name) for name in _listed(args["src"])]
            files = list(zip(sources, map(str, _listed(args["dest"])), strict=True))
            if self._task.check_mode:
                return result | {"changed": bool(files)}
            sent = self._send_all(files, f"{host}: {args.get('label', sources[0].name if sources else '')}")
        except (OSError, ValueError) as error:
            return result | {"failed": True, "msg": str(error)}
        return result | sent | {"changed": bool(files)}

    def _source(self, name: str) -> Path:
        try:
            return Path(self._find_needle("files", name))
        except AnsibleError:
            raise OSError(f"{name} is not there on this machine; give its absolute path") from None

    def _send_all(self, files: list[tuple[Path, str]], label: str) -> dict[str, Any]:
        """Send what the host lacks of each; raises OSError with the remedy where that cannot be done."""
        missing = {}
        for source, dest in files:
            size, (resumed, free) = source.stat().st_size, self._look(dest)
            if resumed > size:
                self._shell(f"rm -f {shlex.quote(dest)}")
                resumed = 0
            missing[source, dest] = size - resumed
            if free < sum(missing.values()):
                raise OSError(self._no_room(source, dest, sum(missing.values()), free))
        for source, dest in files:
            size = source.stat().st_size
            self._send(source, dest, size, size - missing[source, dest], label)
        size = sum(source.stat().st_size for source, _dest in files)
        return {"resumed": size - sum(missing.values()), "size": size}

    def _send(self, source: Path, dest: str, size: int, resumed: int, label: str) -> None:
        """Append to `dest` what comes after `resumed` bytes of `source`."""
        started = shown = time.monotonic()
        with source.open("rb") as file:
            done = file.seek(resumed)
            while chunk := file.read(CHUNK):
                answer = self._shell(f"LC_ALL=C cat >>{shlex.quote(dest)}", chunk)
                if answer["rc"] != 0:
                    there, free = self._look(dest)
                    if free < CHUNK:
                        raise OSError(self._no_room(source, dest, size - there, free))
                    raise OSError(f"cannot write {dest}: {(answer['stderr'] or answer['stdout']).strip()}")
                done += len(chunk)
                now = time.monotonic()
                if now - shown >= float(self._task.args.get("interval", 10)):
                    rate = (done - resumed) / (now - started) / 2**20
                    Display().display(f"  {label} sent {100 * done // size} % of {size >> 20} MiB, {rate:.1f} MiB/s")
                    shown = now

    def _look(self, dest: str) -> tuple[int, int]:
        """How many bytes `dest` has, and how many more its file system takes."""
        script = _LOOK.format(dest=shlex.quote(dest), folder=shlex.quote(dest.rpartition("/")[0]))
        answer = self._shell(script)
        if answer["rc"] != 0:
            raise OSError(f"cannot look at {dest}: {(answer['stderr'] or answer['stdout']).strip()}")
        there, _newline, free = answer["stdout"].partition("\n")
        return int(there or 0), int(free.split()[-3]) * 1024

    @staticmethod
    def _no_room(source: Path, dest: str, needed: int, free: int) -> str:
        folder = dest.rpartition("/")[0]
        return f"{folder} has {free / 2**30:.2f} GiB left, {source.name} needs {needed / 2**30:.2f} GiB more: make room"

    def _shell(self, command: str, data: bytes = b"") -> dict[str, Any]:
        # Where sudo asks for a password, Ansible's local connection gives a terminal and no input unless it pipelines.
        if self._connection.has_option("pipelining"):
            self._connection.set_option("pipelining", True)
        if not data:  # without input, ssh gives a terminal too, whose lines end in \r and have errors among them
            command, data = "sh -s", command.encode()
        answer: dict[str, Any] = self._low_level_execute_command(command, in_data=data)
        return answer
