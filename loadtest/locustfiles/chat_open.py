"""Chat load in an open loop: `--rate` requests a second, however slow the answers are.

    locust -f loadtest/locustfiles/chat_open.py --host https://host --ca ca.crt --key-file key --model name --rate 2

Latencies count from the scheduled time. One user is the dispatcher; more would change nothing.
"""

from __future__ import annotations

from typing import Any

from locust import events

from llamaherd_loadtest.arrivals import Arrivals
from llamaherd_loadtest.locust_options import add_options, use_session
from llamaherd_loadtest.users import OpenLoopUser


class ChatArrivals(OpenLoopUser):
    """The dispatcher, with the process and rate of the command line."""

    def on_start(self) -> None:
        options = self.environment.parsed_options
        self.arrivals = Arrivals(options.arrivals, options.rate, options.seed)


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _options(parser: Any) -> None:
    add_options(parser, open_loop=True)


use_session(ChatArrivals)
