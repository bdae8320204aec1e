"""Filter that explains a failed package installation in one line with the remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# How ansible.builtin.apt, apt-get, ansible.builtin.dnf and dnf report a package that no source has.
_MISSING = (
    r"No package\(?s?\)? matching '([^']+)'",
    r"candidate for (\S+)",
    r"Package '?([^\s']+)'? has no installation candidate",
    r"Unable to locate package (\S+)",
    r"No package (\S+) available",
    r"No match for argument: (\S+)",
)


def package_mistake(result: Mapping[str, Any], packages: Sequence[str]) -> str:
    """Return one line for a failed `result` of ansible.builtin.apt or dnf on `packages`, or "" if it succeeded.

    Their own messages contain the whole command line or pages of output.
    """
    message = re.sub(r"(?s)^'.*' failed: ", "", str(result.get("msg", "")))
    if not message or message.startswith("Nothing to do"):
        return ""
    text = "\n".join(
        [message, *map(str, result.get("failures", ())), *(str(result.get(key, "")) for key in ("stdout", "stderr"))]
    )
    if missing := sorted({name.rstrip(".,") for pattern in _MISSING for name in re.findall(pattern, text)}):
        return (
            f"the host's package sources have no {', '.join(missing)}; run `apt update` (`dnf makecache`) there, "
            "enable the component or repository that has it, or install an equivalent and set "
            "llamaherd_install_packages to false"
        )
    if re.search("No space left on device|don't have enough free space", text):
        return f"no space left to install {', '.join(packages)}: make room in /var and /usr, then run the play again"
    if re.search(r"(?i)\block", text):
        holder = re.search(r"held by process (\d+ \([^)]+\)|\d+)", text)
        return (
            f"packages are locked by {f'process {holder[1]}' if holder else 'another program'} for longer than "
            "llamaherd_packages_wait_s: wait for its end, or raise llamaherd_packages_wait_s"
        )
    said = [line.strip() for line in text.splitlines() if re.match(r"\s*(E:|Error:|error:)", line)]
    reason = said[0] if said else message.strip().splitlines()[-1]
    return f"cannot install {', '.join(packages)}: {reason[:300]}"


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"package_mistake": package_mistake}
