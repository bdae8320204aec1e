"""Chat load in an open loop: `--rate` requests a second or a recorded trace, however slow the answers are.

    locust -f loadtest/locustfiles/chat_open.py --host https://host --ca ca.crt --key-file key --rate 2
    locust -f loadtest/locustfiles/chat_open.py --host https://host --ca ca.crt --key-file key --trace trace.jsonl

Latencies count from the scheduled time. The number of users changes nothing.
"""

from __future__ import annotations

from llamaherd_loadtest.locust_run import measure
from llamaherd_loadtest.users import OpenLoopUser


class ChatArrivals(OpenLoopUser):
    """Stands for the arrivals in Locust's count of users."""


measure(ChatArrivals, open_loop=True)
