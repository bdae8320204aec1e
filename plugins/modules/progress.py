"""Documentation of the action plugin of this name (plugins/action), which does all of the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: progress
short_description: Runs a long command on a host and prints its progress
version_added: 0.1.0
description:
  - Starts the command in the background on the host with its output in a log, and prints the newest line of the
    log with the elapsed time every few seconds.
  - The command continues if the controller dies. The same task of the next run then follows the running command to
    its end.
  - The environment and become settings are those of the task.
options:
  argv:
    description: The command and its arguments.
    type: list
    elements: str
    required: true
  chdir:
    description: The working directory of the command.
    type: path
    default: /
  creates:
    description: A path or glob pattern on the host. The command does not run if a file matches.
    type: path
  log:
    description:
      - The path of the log on the host. C(<log>.pid) exists while the command runs, C(<log>.rc) holds its exit
        code afterwards.
    type: path
    required: true
  label:
    description: The text that every printed line starts with. Defaults to the name of the task.
    type: str
  show:
    description:
      - V(last) prints the newest line every O(interval) seconds, V(all) prints every line once.
    type: str
    choices: [last, all]
    default: last
  interval:
    description: Seconds between two printed lines.
    type: float
    default: 10
  changed:
    description: Whether the task counts as a change.
    type: bool
    default: true
  password:
    description: An environment variable of the command that receives the become password, unless the task sets it.
    type: str
author: ["The llamaherd authors (!UNKNOWN)"]
"""

EXAMPLES = r"""
- name: Build llama.cpp
  llamaherd.llamaherd.progress:
    label: llama.cpp
    log: /opt/llamaherd/llama.cpp/build.log
    argv: [cmake, --build, /opt/llamaherd/llama.cpp/build]
    creates: /opt/llamaherd/llama.cpp/build/bin/llama-server
"""

RETURN = r"""
rc:
  description: The exit code of the command.
  returned: when the command ran
  type: int
  sample: 0
seconds:
  description: How long the command ran, in seconds.
  returned: when the command ran
  type: float
  sample: 192.4
msg:
  description: The last lines of the log, or why the command did not run.
  returned: on failure, in check mode and when a file matches creates
  type: str
  sample: "h1: llama.cpp: ninja: build stopped: subcommand failed"
"""
