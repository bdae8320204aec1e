"""Roles share variables of roles/common alone: others are read in their own role and in the templates of hosts."""

from __future__ import annotations

import re

from tests.unit.conftest import ROOT

ROLES = sorted(path.name for path in ROOT.glob("roles/*") if path.name != "common")
PRIVATE = re.compile(rf"(?<!\w)__?({'|'.join(ROLES)})_\w+")


def test_no_role_reads_another_roles_private_variables() -> None:
    files = [path for role in (*ROLES, "common") for path in ROOT.glob(f"roles/{role}/*/*.[yj]*")]
    assert len(files) > 100
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        for match in PRIVATE.finditer(path.read_text())
        if match[1] != path.relative_to(ROOT).parts[1]
    }
    assert found == set()


def test_no_role_has_another_ones_files_by_link() -> None:
    assert [str(path.relative_to(ROOT)) for path in ROOT.glob("roles/**/*") if path.is_symlink()] == []
