"""What the locustfiles share: their command-line options and a load session for each test that Locust starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from locust import events
from locust.exception import StopTest
from locust.user.users import User

from llamaherd_loadtest.arrivals import PROCESSES
from llamaherd_loadtest.client import ChatClient, Target
from llamaherd_loadtest.probe import ServerUnusable, calibrate
from llamaherd_loadtest.samples import write_samples
from llamaherd_loadtest.session import LoadSession
from llamaherd_loadtest.workload import Prompts, load_workload


def add_options(parser: Any, *, open_loop: bool = False) -> None:
    """Add the options to Locust's own; each can also be set by the environment variable named with it."""
    group = parser.add_argument_group("llamaherd")
    group.add_argument(
        "--model", env_var="LLAMAHERD_MODEL", default="", help="the model's name, as /v1/models gives it"
    )
    group.add_argument("--ca", env_var="LLAMAHERD_CA", default="", help="file with the certificate of the server's CA")
    group.add_argument("--key-file", env_var="LLAMAHERD_KEY_FILE", default="", help="file that holds the API key")
    group.add_argument("--workload", env_var="LLAMAHERD_WORKLOAD", default="chat", help="its name or a .yml file")
    group.add_argument("--max-tokens", type=int, default=0, help="length of each answer; 0: as the workload says")
    group.add_argument("--seed", type=int, default=0, help="prompts are the same for the same seed")
    group.add_argument("--request-timeout", type=float, default=600.0, help="seconds")
    group.add_argument("--samples", default="", help="file for the raw samples, a JSON object a line")
    if open_loop:
        group.add_argument("--rate", type=float, default=1.0, help="requests a second")
        group.add_argument("--arrivals", choices=PROCESSES, default="poisson", help="how they are spaced")


def use_session(user: type[User]) -> None:
    """Give `user` a fresh session whenever Locust starts a test, and write its samples when the test stops.

    A server that cannot be used, or options that make no sense, end the test with one clear line.
    """
    session: LoadSession | None = None

    @events.test_start.add_listener  # type: ignore[untyped-decorator]
    def start(environment: Any, **_: Any) -> None:
        nonlocal session
        try:
            user.session = session = _open_session(environment)
        except (ServerUnusable, ValueError, OSError) as error:
            environment.process_exit_code = 2
            raise StopTest(str(error)) from None

    @events.test_stop.add_listener  # type: ignore[untyped-decorator]
    def stop(environment: Any, **_: Any) -> None:
        if session is not None and environment.parsed_options.samples:
            write_samples(Path(environment.parsed_options.samples), session.samples)


def _open_session(environment: Any) -> LoadSession:
    options = environment.parsed_options
    target = Target(
        url=environment.host or "",
        model=options.model,
        key=Path(options.key_file).read_text(encoding="utf-8").strip() if options.key_file else "",
        ca=Path(options.ca) if options.ca else None,
        timeout_s=options.request_timeout,
    )
    workload = load_workload(options.workload).with_output(options.max_tokens)
    client = ChatClient(target)
    prompts = Prompts(
        workload, model=target.model, seed=options.seed, calibration=calibrate(client, target, options.seed)
    )
    return LoadSession(client, prompts, environment.events.request.fire)
