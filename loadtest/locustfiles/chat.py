"""Chat load in a closed loop, with Locust's own commands and web page:

    locust -f loadtest/locustfiles/chat.py --host https://host --ca ca.crt --key-file key

TTFT and TPOT are entries of their own in Locust's statistics; `--samples` keeps every request, `--summary` sums them
up. A shape can be put beside it: -f loadtest/locustfiles/chat.py,loadtest/locustfiles/shapes/ramp.py
"""

from __future__ import annotations

from llamaherd_loadtest.locust_run import measure
from llamaherd_loadtest.users import ClosedLoopUser


class ChatUser(ClosedLoopUser):
    """One client that reads each answer to its end before it asks again."""


measure(ChatUser)
