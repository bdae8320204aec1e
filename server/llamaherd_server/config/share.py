"""One server's part of a key's limits, which the servers of a fleet hold together, each by what it counts itself."""

from __future__ import annotations

from dataclasses import dataclass

from llamaherd_server.config.keys import Key, Share


@dataclass(frozen=True, slots=True)
class Part:
    """Of number `server`, from 0, of `servers`; so many of those are `here`. From number `servers` on: nothing."""

    servers: int
    server: int
    here: int

    def requests(self, limit: float) -> float:
        """Of so many requests, at a time or a minute: whole ones, so that all parts together are no more."""
        if self.server >= self.servers:
            return 0
        part = (int(limit) + self.servers - 1 - self.server) // self.servers
        return part + (limit % 1 if self.server == 0 else 0)

    def tokens(self, limit: float) -> float:
        """Of so many tokens a minute."""
        return limit / self.servers if self.server < self.servers else 0

    def budget(self, limit: float) -> float:
        """Of so many tokens a day or a month, which all servers on this host count together."""
        return limit * self.here / self.servers


def part_of(share: Share, instance: int, key: Key) -> Part:
    """Of the key's limits, for the host's server of that number, from 0.

    Where the key has fewer requests than there are servers, only so many have a part of any.
    """
    counts = (key.max_concurrent, key.requests_per_minute)
    servers = min([share.servers, *(max(1, int(count)) for count in counts if count is not None)])
    here = max(0, min(servers, share.first + share.here) - share.first)
    return Part(servers, share.first + instance, here)
