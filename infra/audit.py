"""`make audit`: the pinned dependencies against the advisories that PyPI knows of, by pip-audit.

Ends with 0 if there are none, 1 if there are some, 2 if that cannot be said: where no advisories are to be had, as
behind a mirror, pip-audit reports a clean result. So it is first asked of a release that has many.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CONTROL = "django==2.2"
CLEAN, FOUND, UNKNOWN = 0, 1, 2


def audit(lock: Path, tool: Path) -> tuple[int, list[str]]:
    """Exit code, and what to print, for the pins in `lock`. tool: the command pip-audit."""
    with TemporaryDirectory() as scratch:
        control = Path(scratch) / "control.txt"
        control.write_text(CONTROL)
        known = _asked(control, tool)
    if isinstance(known, str) or not any(each.get("vulns") for each in known):
        why = known if isinstance(known, str) else f"it knows none of {CONTROL}, which has many"
        return UNKNOWN, [f"no advisories can be had here ({why}); run it where the index itself can be reached"]
    found = _asked(lock, tool)
    return (UNKNOWN, [found]) if isinstance(found, str) else verdict(found)


def verdict(dependencies: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """Exit code and lines for what pip-audit says of each dependency."""
    lines = [
        f"{each['name']} {each['version']}: {', '.join([found['id'], *found['aliases']])}, "
        f"mended in {', '.join(found['fix_versions']) or 'no version yet'}"
        for each in dependencies
        for found in each.get("vulns", [])
    ]
    unknown = [f"{each['name']}: not audited: {each['skip_reason']}" for each in dependencies if "skip_reason" in each]
    if not lines and not unknown:
        return CLEAN, [f"{len(dependencies)} dependencies, no advisory against any"]
    return FOUND if lines else UNKNOWN, lines + unknown


def _asked(requirements: Path, tool: Path) -> list[dict[str, Any]] | str:
    """What pip-audit says of each of them, or why it says nothing."""
    done = subprocess.run(
        [tool, "--requirement", requirements, "--no-deps", "--disable-pip", "--format", "json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    try:
        said: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return (done.stderr.splitlines() or [f"pip-audit ended with {done.returncode}"])[-1]
    return said


def main() -> None:
    """Audit the file that the command line names, by the pip-audit beside this Python."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m infra.audit requirements.lock")
    code, lines = audit(Path(sys.argv[1]), Path(sys.executable).with_name("pip-audit"))
    print("\n".join(lines) if code == CLEAN else "\n".join(f"error: {line}" for line in lines))
    sys.exit(code)


if __name__ == "__main__":
    main()
