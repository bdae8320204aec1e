"""Closed-loop chat load, with Locust's own commands and web page:

    locust -f loadtest/locustfiles/chat.py --host https://host --ca ca.crt --key-file key

TTFT and TPOT are separate entries in Locust's statistics; `--samples` writes every request, `--summary` a summary. A
shape can be added: -f loadtest/locustfiles/chat.py,loadtest/locustfiles/shapes/ramp.py
"""

from __future__ import annotations

import random

from llamaherd_loadtest.locust_run import measure
from llamaherd_loadtest.users import ClosedLoopUser


class ChatUser(ClosedLoopUser):
    """A client that reads each answer to its end and thinks before its next request."""

    def wait_time(self) -> float:
        think_s: float = self.environment.parsed_options.think
        return random.expovariate(1 / think_s) if think_s else 0.0


measure(ChatUser)
