"""Documentation of the action plugin of this name (plugins/action), which does all of the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: check_variables
short_description: Checks every llamaherd variable of a host against the roles' argument_specs
version_added: 0.1.0
description:
  - Checks the names and values of all variables that begin with C(llamaherd_) against C(meta/argument_specs.yml)
    of every role.
  - Fails with one line for each mistake and the nearest correct name.
  - Runs on the controller, reads no host and changes nothing.
author: ["The llamaherd authors (!UNKNOWN)"]
"""

EXAMPLES = r"""
- name: Check the names and types of all llamaherd variables
  llamaherd.llamaherd.check_variables:
"""

RETURN = r"""
msg:
  description: One line for each mistake.
  returned: failure
  type: str
  sample: llamaherd_server_prot is not a llamaherd variable; did you mean llamaherd_server_port?
"""
