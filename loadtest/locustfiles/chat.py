"""Chat load in a closed loop, with Locust's own commands and web page:

    locust -f loadtest/locustfiles/chat.py --host https://host --ca ca.crt --key-file key

TTFT and TPOT are entries of their own in Locust's statistics; `--samples` keeps every request, `--summary` sums them
up. A shape can be put beside it: -f loadtest/locustfiles/chat.py,loadtest/locustfiles/shapes/ramp.py
"""

from __future__ import annotations

import random

from llamaherd_loadtest.locust_run import measure
from llamaherd_loadtest.users import ClosedLoopUser


class ChatUser(ClosedLoopUser):
    """One client that reads each answer to its end, and thinks, before it asks again."""

    def wait_time(self) -> float:
        think_s: float = self.environment.parsed_options.think
        return random.expovariate(1 / think_s) if think_s else 0.0


measure(ChatUser)
