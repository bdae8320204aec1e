"""One server's part of a key's limits. The servers of a fleet split each limit, and each counts only its own part."""

from __future__ import annotations

from dataclasses import dataclass

from llamaherd_server.config.keys import Key, Share


@dataclass(frozen=True, slots=True)
class Part:
    """The part of server `server` (from 0) of `servers`, of which `here` run on this host. Higher ones get nothing."""

    servers: int
    server: int
    here: int

    def requests(self, limit: float) -> float:
        """Return the part of a limit on requests, concurrent or per minute: whole requests that add up to it."""
        if self.server >= self.servers:
            return 0
        part = (int(limit) + self.servers - 1 - self.server) // self.servers
        return part + (limit % 1 if self.server == 0 else 0)

    def tokens(self, limit: float) -> float:
        """Return the part of a limit in tokens per minute."""
        return limit / self.servers if self.server < self.servers else 0

    def budget(self, limit: float) -> float:
        """Return the part of a budget of tokens per day or month, which all servers of this host count together."""
        return limit * self.here / self.servers


def part_of(share: Share, instance: int, key: Key) -> Part:
    """Return the part of the key's limits for this host's server number `instance`, from 0.

    If the key allows fewer requests than there are servers, only that many servers get a part.
    """
    counts = (key.max_concurrent, key.requests_per_minute)
    servers = min([share.servers, *(max(1, int(count)) for count in counts if count is not None)])
    here = max(0, min(servers, share.first + share.here) - share.first)
    return Part(servers, share.first + instance, here)
