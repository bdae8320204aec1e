"""progress: runs a long command on a host and prints its progress; documented in plugins/modules/progress.py.

The command runs in the background and writes its output to a log on the host. Every few seconds the plugin prints the
newest line of the log with the elapsed time. If the controller dies, the command continues, and the same task of the
next run follows it to its end.
"""

from __future__ import annotations

import re
import shlex
import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

POLL_S = 1.0
TAIL_LINES = 30
_NINJA = re.compile(r"^\[(\d+)/(\d+)\]")
# After a reboot, another process may have the pid, so the command line is checked too.
_RUNS = """
runs() {{
  pid=$(cat {log}.pid 2>/dev/null) && kill -0 "$pid" 2>/dev/null || return 1
  if [ -d /proc/self ]; then tr '\\0' ' ' <"/proc/$pid/cmdline"; else ps -o command= -p "$pid"; fi | grep -qF {log}
}}
"""
_EXISTS = 'for path in {creates}; do [ ! -e "$path" ] || exit 0; done; exit 1'
# Commands run with an English locale, so these messages match on any host.
_FULL = re.compile("No space left on device|Disk quota exceeded|Errno 28")
_FULL_BELOW_KIB = 1024  # with less space left, even the log may not have been written
# Until the command has been executed, its process has the command line of this shell: on a busy host for seconds.
# The environment can contain a token, so it is not passed in arguments, which all users of a host can read.
_START = (
    _RUNS
    + """
mkdir -p {directory} && cd {chdir} || exit 1
if runs; then exit 0; fi
rm -f {log}.rc
export LC_ALL=C.UTF-8
{environment} nohup sh -c {job} {log} >{log} 2>&1 </dev/null &
echo $! >{log}.pid
tries=0
until runs || [ -f {log}.rc ] || [ $tries -eq 100 ]; do sleep 0.1; tries=$((tries + 1)); done
"""
)
# The rename makes the exit code appear at once, so that a reader never sees half of it.
_JOB = "{command}; echo $? >{log}.rc.new; mv {log}.rc.new {log}.rc; rm -f {log}.pid"
_POLL = (
    _RUNS
    + """
if [ -f {log}.rc ]; then printf 'rc=%s\\n' "$(cat {log}.rc)"
elif runs; then echo running
elif sleep 1; [ -f {log}.rc ]; then printf 'rc=%s\\n' "$(cat {log}.rc)"
elif runs; then echo running
else echo rc=137; fi
tail -c +{offset} {log} 2>/dev/null | head -c 1000000
"""
)


def elapsed(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def summary(line: str, seconds: float) -> str:
    """Return one line of progress: ninja's `[120/224] …` becomes `[120/224] 54 % 3m12s`; others keep their text."""
    found = _NINJA.match(line)
    if found:
        done, total = map(int, found.groups())
        return f"[{done}/{total}] {100 * done // total} % {elapsed(seconds)}"
    return f"{line[:100]} {elapsed(seconds)}".strip()


def newest(shown: str, lines: list[str]) -> str:
    """Return the line that best shows the progress: the last one, or in a ninja build the last one with step counts."""
    said = [line for line in lines if line.strip()]
    steps = [line for line in said if _NINJA.match(line)]
    if _NINJA.match(shown) or steps:  # lines in between are compiler warnings
        return steps[-1] if steps else shown
    return said[-1] if said else shown


def fullest(df: str) -> tuple[str, int]:
    """Return mount point and free KiB of the file system with the least free space in the output of `df -Pk`."""
    rows = [line.split(None, 5) for line in df.splitlines()[1:]]
    return min(((row[5], int(row[3])) for row in rows if len(row) == 6), key=lambda row: row[1], default=("", 0))


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible is untyped
    _VALID_ARGS = frozenset({"argv", "chdir", "creates", "log", "label", "show", "interval", "changed", "password"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        args = self._task.args
        changed = bool(args.get("changed", True))
        if self._task.check_mode:
            return result | {"changed": changed, "msg": f"would run {shlex.join(map(str, args['argv']))}"}
        if "creates" in args and self._exists(str(args["creates"])):
            return result | {"changed": False, "msg": f"{args['creates']} is there"}
        log = str(args["log"])
        host = (task_vars or {}).get("inventory_hostname", "")
        label = f"{host}: {args.get('label', self._task.name)}"
        show_all = args.get("show", "last") == "all"
        started = time.monotonic()
        environment = self._environment(str(args.get("password", "")))
        argv, chdir = [str(word) for word in args["argv"]], str(args.get("chdir", "/"))
        self._start(argv, chdir, environment, log)
        rc, tail = self._follow(log, label, show_all, float(args.get("interval", 10)), started)
        result |= {"rc": rc, "changed": changed, "seconds": round(time.monotonic() - started, 1)}
        if rc != 0 and (full := self._full([log.rpartition("/")[0], chdir, *argv], tail)):
            result |= {"failed": True, "msg": f"{label}: {full}"}
        elif rc != 0:
            last = tail.pop() if tail else f"exit code {rc}, no output"
            before = "" if show_all or not tail else "\n".join(["", f"before that, in {log}:", *tail])
            result |= {"failed": True, "msg": f"{label}: {last}{before}"}
        return result

    def _exists(self, pattern: str) -> bool:
        # Stars stay unquoted, so that the shell expands them.
        script = _EXISTS.format(creates=shlex.quote(pattern).replace("*", "'*'"))
        return bool(self._shell(script)["rc"] == 0)

    def _full(self, words: list[str], tail: list[str]) -> str:
        """Return the full file system and the remedy if that is why a command with these paths failed; otherwise ""."""
        named = {path for word in words if (path := word.rpartition("=")[2]).startswith("/")}
        paths = named | {"/tmp"}  # noqa: S108 (only looked at)
        answer = self._shell(f"LC_ALL=C df -Pk {' '.join(map(shlex.quote, sorted(paths)))} 2>/dev/null")
        mount, free = fullest(answer["stdout"])
        if not any(map(_FULL.search, tail)) and (tail or free > _FULL_BELOW_KIB):
            return ""
        return (
            f"no space left on the file system {mount} ({free >> 10} MiB), where it writes: make room there and run "
            "the play again; it continues from here"
        )

    def _environment(self, password: str) -> str:
        environment = str(self._compute_environment_string())
        told = self._play_context.become_pass
        if password and told and f"{password}=" not in environment:
            environment = f"{environment} {password}={shlex.quote(told)}"
        return environment

    def _start(self, argv: list[str], chdir: str, environment: str, log: str) -> None:
        quoted = shlex.quote(log)
        script = _START.format(
            directory=shlex.quote(log.rpartition("/")[0]),
            chdir=shlex.quote(chdir),
            log=quoted,
            environment=environment,
            job=shlex.quote(_JOB.format(command=shlex.join(argv), log=quoted)),
        )
        answer = self._shell(script)
        if answer["rc"] != 0 and not _FULL.search(answer["stderr"]):  # the caller reports a full disk
            raise RuntimeError(f"cannot start in {chdir}: {answer['stderr'] or answer['stdout']}")

    def _shell(self, script: str) -> dict[str, Any]:
        """Run `script` on the host. It is sent on stdin, because a terminal would end the background command."""
        # If sudo asks for a password, Ansible's local connection uses a terminal without stdin unless it pipelines.
        if self._connection.has_option("pipelining"):
            self._connection.set_option("pipelining", True)
        answer: dict[str, Any] = self._low_level_execute_command("sh -s", in_data=script.encode())
        return answer

    def _follow(self, log: str, label: str, show_all: bool, interval: float, started: float) -> tuple[int, list[str]]:
        """Follow the log until the command ends and return its exit code and the last lines of the log."""
        display = Display()
        lines: list[str] = []
        line = ""
        rest, offset, shown_at, pause = "", 1, time.monotonic(), 0.1
        while True:
            time.sleep(pause)
            pause = min(POLL_S, pause * 2)
            answer = self._shell(_POLL.format(log=shlex.quote(log), offset=offset))
            state, _newline, text = answer["stdout"].partition("\n")
            offset += len(text.encode("utf-8", "surrogateescape"))
            *new, rest = (rest + text).split("\n")
            # A progress bar rewrites its line with \r, so only the last version counts.
            new = [line.rstrip("\r").rpartition("\r")[2] for line in new]
            lines = [each for each in [*lines, *new] if each.strip()][-TAIL_LINES:]
            line = newest(line, new)
            now = time.monotonic()
            if show_all:
                for each in new:
                    display.display(f"  {label}: {each}" if each else "")
            elif line and state == "running" and now - shown_at >= interval:
                display.display(f"  {label} {summary(line, now - started)}")
                shown_at = now
            if state.startswith("rc="):  # the exit code is missing if the disk was full
                return int(state.removeprefix("rc=") or 1), [*lines, *([rest] if rest.strip() else [])]
