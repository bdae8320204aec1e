"""Documentation of the action plugin of this name (plugins/action), which does all of the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: send
short_description: Sends a large file from the controller to a host and resumes an interrupted transfer
version_added: 0.1.0
description:
  - M(ansible.builtin.copy) stores a file in the home directory of the ssh user first, where a model may not fit.
    This plugin appends to O(dest) through the connection and become settings of the task, in pieces of 32 MiB.
  - Checks the free space of the host before it sends.
  - An existing O(dest) is treated as the start of the same file. Verify the checksum of the whole file afterwards.
options:
  src:
    description: The file on the controller, or several. None is sent unless all of them fit.
    type: list
    elements: path
    required: true
  dest:
    description: The file on the host, or one for each of O(src). Its directory must exist.
    type: list
    elements: path
    required: true
  label:
    description: The text that every progress line starts with. Defaults to the name of the file.
    type: str
  interval:
    description: Seconds between two progress lines.
    type: float
    default: 10
author: ["The llamaherd authors (!UNKNOWN)"]
"""

EXAMPLES = r"""
- name: Send the model to the host
  llamaherd.llamaherd.send:
    src: /srv/models/model.gguf
    dest: /var/lib/llamaherd/models/model.gguf.part
"""

RETURN = r"""
resumed:
  description: The bytes that the host had before the transfer.
  returned: success
  type: int
  sample: 0
size:
  description: The size of the files in bytes.
  returned: success
  type: int
  sample: 91726304
"""
