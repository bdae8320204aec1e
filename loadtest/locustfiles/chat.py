"""Chat load in a closed loop, with Locust's own commands and web page:

    locust -f loadtest/locustfiles/chat.py --host https://host --ca ca.crt --key-file key --model name

TTFT and TPOT are entries of their own in Locust's statistics; `--samples` keeps every request.
"""

from __future__ import annotations

from typing import Any

from locust import events

from llamaherd_loadtest.locust_options import add_options, use_session
from llamaherd_loadtest.users import ClosedLoopUser


class ChatUser(ClosedLoopUser):
    """One client that reads each answer to its end before it asks again."""


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _options(parser: Any) -> None:
    add_options(parser)


use_session(ChatUser)
