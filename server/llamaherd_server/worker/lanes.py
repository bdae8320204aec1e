"""Runs slow tasks on a few threads, shared fairly among their owners."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

LANES = 4


@dataclass(eq=False, slots=True)
class Task:
    """Work for the request `id`. `call` gets the task, to check `cancelled` and to set `stop`, which ends it early."""

    id: int
    owner: str
    call: Callable[[Task], None]
    cancelled: bool = False
    stop: Callable[[], None] = field(default=lambda: None)


class Lanes:
    """Runs each owner's tasks in order. Owners with the fewest busy threads go first; none may occupy all of them."""

    def __init__(self, lanes: int = LANES) -> None:
        self._max_per_owner = max(1, lanes - 1)
        self._lock = threading.Condition()
        self._waiting: OrderedDict[str, deque[Task]] = OrderedDict()
        self._running: dict[int, Task] = {}
        for _ in range(lanes):
            threading.Thread(target=self._work, daemon=True).start()

    def add(self, task: Task) -> None:
        with self._lock:
            self._waiting.setdefault(task.owner, deque()).append(task)
            self._lock.notify()

    def cancel(self, request_id: int) -> bool:
        """Cancel the request's task, waiting or running; returns whether it had one."""
        with self._lock:
            task = self._running.get(request_id)
            if task is not None:
                task.cancelled = True
                task.stop()
                return True
            for owner, tasks in self._waiting.items():
                for waiting in tasks:
                    if waiting.id == request_id:
                        tasks.remove(waiting)
                        self._drop_if_empty(owner)
                        return True
        return False

    def _work(self) -> None:
        while True:
            with self._lock:
                while (task := self._next()) is None:
                    self._lock.wait()
                self._running[task.id] = task
            try:
                task.call(task)
            finally:
                with self._lock:
                    del self._running[task.id]
                    self._lock.notify()

    def _next(self) -> Task | None:
        """The next task of the owner with the fewest busy threads; of several, the one that has waited longest."""
        counts = {owner: sum(one.owner == owner for one in self._running.values()) for owner in self._waiting}
        free = [owner for owner, count in counts.items() if count < self._max_per_owner]
        if not free:
            return None
        owner = min(free, key=counts.__getitem__)
        task = self._waiting[owner].popleft()
        self._waiting.move_to_end(owner)
        self._drop_if_empty(owner)
        return task

    def _drop_if_empty(self, owner: str) -> None:
        if not self._waiting[owner]:
            del self._waiting[owner]
