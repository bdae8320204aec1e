"""A worker that drafts as if that cost nothing, so that drafts are as long as may be on every machine."""

import sys

from llamaherd_server.worker.__main__ import main
from llamaherd_server.worker.speculation import StepTimes

for _name, _value in ("cost", 1e-30), ("step_cost", 1e-30), ("token_s", 1.0):
    setattr(StepTimes, _name, lambda _self, _sequences, value=_value: value)

if __name__ == "__main__":
    sys.exit(main())
