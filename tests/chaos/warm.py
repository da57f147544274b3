"""A process that has imported all that `quee sweep` needs, and forks one for each line that it reads from its input.

The imports take most of such a sweep's seconds, and nothing in them can be lost. The sweep is what the command runs, in
a session of its own; a second process takes what it says into NOTED.said, and writes NOTED.pid, at its end NOTED.code.
"""

import os
import signal
import sys
from pathlib import Path

from flows.cli import main, quiet_surroundings
from tests.processes import end_with_parent


def serve() -> None:
    """Answer each line, FOLDER of a sweep.yaml, tab, NOTED, by a fork; returns in the sweep's process alone."""
    quiet_surroundings(verbose=False)
    import flows.full_sweep  # noqa: F401 (the command imports it late)
    import quee_core.s3_place  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("warm", flush=True)
    for line in iter(sys.stdin.readline, ""):
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            end_with_parent()
            if _is_the_sweep(*map(Path, line.rstrip("\n").split("\t"))):
                return
            os._exit(0)
    os._exit(0)


def _is_the_sweep(folder: Path, noted: Path) -> bool:
    """Fork once more: True in the child, which is the sweep; False in the parent, once the sweep has ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        end_with_parent()
        os.setsid()
        os.chdir(folder)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.close(reader)
        os.close(writer)
        return True
    os.close(writer)
    noted.with_suffix(".pid").write_text(f"{child}\n")
    with noted.with_suffix(".said").open("ab", buffering=0) as said:
        while some := os.read(reader, 65536):
            said.write(some)
    status = os.waitpid(child, 0)[1]
    noted.with_suffix(".code").write_text(f"{os.waitstatus_to_exitcode(status)}\n")
    return False


if __name__ == "__main__":
    serve()
    sys.argv = ["quee", "sweep", "sweep.yaml"]
    main()
