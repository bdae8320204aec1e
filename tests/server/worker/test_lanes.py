"""Lanes: what waits on them, and what was cancelled before it began."""

from __future__ import annotations

import threading
from queue import SimpleQueue

from llamaherd_server.worker.lanes import Lanes, Task

WAIT_S = 10


def test_a_waiting_task_that_is_cancelled_leaves_the_lanes_to_others() -> None:
    lanes = Lanes(2)
    began: SimpleQueue[int] = SimpleQueue()
    go_on = threading.Event()

    def call(task: Task) -> None:
        began.put(task.id)
        go_on.wait(WAIT_S)

    for number in (1, 2, 3):
        lanes.add(Task(number, "a", call))
    assert began.get(timeout=WAIT_S) == 1
    assert lanes.cancel(2)
    assert lanes.cancel(3)
    assert not lanes.cancel(2)
    go_on.set()
    for number in range(4, 10):
        lanes.add(Task(number, f"owner {number}", call))
        assert began.get(timeout=WAIT_S) == number
