"""Open-loop chat load: `--rate` requests per second or a recorded trace, however slow the answers are.

    locust -f loadtest/locustfiles/chat_open.py --host https://host --ca ca.crt --key-file key --rate 2
    locust -f loadtest/locustfiles/chat_open.py --host https://host --ca ca.crt --key-file key --trace trace.jsonl

Latencies count from the scheduled time. The number of users has no effect.
"""

from __future__ import annotations

from llamaherd_loadtest.locust_run import measure
from llamaherd_loadtest.users import OpenLoopUser


class ChatArrivals(OpenLoopUser):
    """Represents the arrivals in Locust's user count."""


measure(ChatArrivals, open_loop=True)
