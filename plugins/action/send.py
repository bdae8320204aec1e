"""send: copies large files from the controller to a host; documented in plugins/modules/send.py.

ansible.builtin.copy stores a file in the ssh user's ~/.ansible/tmp first, where a model may not fit. This plugin
checks that the file fits, then appends it to `dest` in chunks through the task's own connection and become. It treats
an existing `dest` as the start of the same file, so the caller must verify the sha256 of the result. It sends none of
several files unless all of them fit.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

CHUNK = 1 << 25  # larger chunks need more memory on the controller, smaller ones more round trips
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
        """Send the missing part of each file. Raises OSError with the remedy if one does not fit or cannot be sent."""
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
        """Append `source` to `dest`, from byte `resumed` on."""
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
        """Return the size of `dest` (0 if it does not exist) and the free space of its file system, in bytes."""
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
        # If sudo asks for a password, Ansible's local connection uses a terminal without stdin unless it pipelines.
        if self._connection.has_option("pipelining"):
            self._connection.set_option("pipelining", True)
        if not data:  # without stdin, ssh uses a terminal too, which adds \r and mixes in stderr
            command, data = "sh -s", command.encode()
        answer: dict[str, Any] = self._low_level_execute_command(command, in_data=data)
        return answer
