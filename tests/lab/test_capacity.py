"""What the capacity simulation says of fleets, beside fleets of one, two and three hosts.

They run the server over the double that paces its tokens, slower the more sequences it has, behind the real edge: two
cores compute no model for so many users.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest

from llamaherd_loadtest.capacity import Profile, of_workload, users_served
from llamaherd_loadtest.limits import observe, parse_limit
from llamaherd_loadtest.samples import OK
from llamaherd_loadtest.workload import load_workload
from tests.lab.conftest import ROOT, Herd
from tests.lab.fleet import EDGE, HOSTS, paced, serving
from tests.lab.load import target, thinking

pytestmark = [pytest.mark.lab, pytest.mark.fleet, pytest.mark.timeout(3600)]
PARALLEL = 8
THINK_S = 3.0
LIMIT = parse_limit("ttft_p95=1s")
WORKLOAD = ROOT / "tests/lab/varied.yml"


@pytest.fixture(scope="module")
def fleet(paced_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    """e1 before f1, f2 and f3."""
    pace = {"PACED_STEP_MS": 20, "PACED_SLOT_MS": 5, "PACED_PREFILL": 1000}
    folder = tmp_path_factory.mktemp("inventory")
    with paced(folder, paced_server, parallel=PARALLEL, hosts=HOSTS, **pace) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def profile(fleet: Herd) -> Profile:
    """One host's, as an operator measures it."""
    behind_the_edge(fleet, 1)
    options = [f"--parallel={PARALLEL}", f"--workload={WORKLOAD}", "--model=chat", "--window=5", "--url"]
    command = [sys.executable, "-m", "llamaherd_loadtest.profile", *options, *target(fleet)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return msgspec.json.decode(done.stdout, type=Profile)


def behind_the_edge(fleet: Herd, hosts: int) -> None:
    serving(fleet, HOSTS[:hosts])
    fleet.succeed(*EDGE)


@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_a_fleet_serves_as_many_users_as_predicted(fleet: Herd, profile: Profile, hosts: int) -> None:
    predicted = users_served(profile, hosts, THINK_S, of_workload(load_workload(str(WORKLOAD))), [LIMIT])
    behind_the_edge(fleet, hosts)
    fewer, more = math.floor(0.85 * predicted), math.ceil(1.15 * predicted)
    seen = {users: ttft_p95(fleet, users) for users in (fewer, more)}
    print(f"{hosts} hosts: {predicted} users predicted; seen TTFT p95, ms, by users: {seen}")
    assert seen[fewer] <= LIMIT.ms < seen[more]


def ttft_p95(fleet: Herd, users: int) -> float:
    """Milliseconds."""
    samples = thinking(fleet, users, THINK_S, WORKLOAD, settle_s=15, window_s=30)
    assert {sample.outcome for sample in samples} == {OK}
    seen = observe(LIMIT, samples)
    assert seen
    return seen
