"""The audit of dependencies is clean only if advisories were there to be found."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.audit import audit, verdict

PLAIN: dict[str, Any] = {"name": "numpy", "version": "2.4.6", "vulns": []}
BAD: dict[str, Any] = {
    "name": "jinja2", "version": "2.10",
    "vulns": [{"id": "PYSEC-2019-217", "aliases": ["CVE-2019-10906"], "fix_versions": ["2.10.1"], "description": "…"}],
}  # fmt: skip
OPEN: dict[str, Any] = {"name": "x", "version": "1", "vulns": [{"id": "PYSEC-1", "aliases": [], "fix_versions": []}]}
SKIPPED: dict[str, Any] = {"name": "ours", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("dependencies", "code", "told"),
    [
        ([PLAIN], 0, ["1 dependencies, no advisory against any"]),
        ([PLAIN, BAD], 1, ["jinja2 2.10: PYSEC-2019-217, CVE-2019-10906, mended in 2.10.1"]),
        ([OPEN], 1, ["x 1: PYSEC-1, mended in no version yet"]),
        ([PLAIN, SKIPPED], 2, ["ours: not audited: Dependency not found on PyPI"]),
        ([BAD, SKIPPED], 1, None),
    ],
)
def test_what_was_not_audited_is_not_clean(dependencies: list[dict], code: int, told: list[str] | None) -> None:
    found = verdict(dependencies)
    assert found[0] == code
    assert told in (None, found[1])


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ('{"dependencies": [{"name": "django", "version": "2.2", "vulns": []}]}', "it knows none of django==2.2"),
        ('{"dependencies": [{"name": "django", "skip_reason": "not found"}]}', "it knows none of django==2.2"),
        ("", "pip-audit ended with 3"),
    ],
)
def test_where_a_release_with_known_faults_seems_clean_nothing_else_does(tmp_path: Path, says: str, why: str) -> None:
    """A program in the place of pip-audit prints what that prints behind a mirror, which has no advisories."""
    tool = tmp_path / "pip-audit"
    tool.write_text(f"#!{sys.executable}\nimport sys\nprint({says!r})\nsys.exit(0 if {says!r} else 3)\n")
    tool.chmod(0o755)
    code, [line] = audit(tmp_path / "requirements.lock", tool)
    assert code == 2
    assert line.startswith(f"no advisories can be had here ({why}")


def test_the_audit_stands_by_itself() -> None:
    """It runs in the environment of pip-audit, where nothing of quee's is installed."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); import infra.audit"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
