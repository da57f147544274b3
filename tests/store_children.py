"""Processes that write to a store and do not live to tell, or may not write: run by the store's tests, as a script.

store_children.py write URL COUNT       publish cells 0, 1, ... and name each one that is finished
store_children.py stop-at-each-step ROOT kill|interrupt
                                        publish one table into ROOT/0, ROOT/1, ..., each time in a process that ends
                                        just before the next step that it takes on the disk; prints how many
store_children.py race URL PROCESSES COUNT
                                        publish the same cells from several processes at once
store_children.py unprivileged URL      publish without the right to pass over permissions; prints the error
store_children.py limited URL BYTES     publish while no file may grow beyond BYTES; prints the error
"""

import ctypes
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable

from quee_core.errors import StoreError
from quee_core.store import Store
from tests.feature_tables import numbered_cell, small_table

STEPS = ("open", "os.mkdir", "os.rename", "os.link", "os.remove")  # audit events that are raised before each of them


def write(url: str, count: int) -> None:
    store = Store.open(url)
    for number in range(count):
        store.put_table(numbered_cell(number), small_table(number, images=2000, classes=20, embedding=32))
        print(number, flush=True)


def stop_at_each_step(root: str, how: str) -> int:
    """Fork a writer for each step, until one gets through; returns how many did not."""
    point = 0
    warm_up()
    while _in_child(lambda number=point: _publish_until(f"{root}/{number}", number, how)) != 0:
        point += 1
    return point


def _publish_until(folder: str, point: int, how: str) -> None:
    steps = 0

    def watch(event: str, args: tuple[object, ...]) -> None:
        nonlocal steps
        if event in STEPS and str(args[0]).startswith(folder):
            steps += 1
            if steps == point + 1:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt

    sys.addaudithook(watch)
    Store.open(folder).put_table(numbered_cell(0), small_table(0))


def race(url: str, processes: int, count: int) -> None:
    """Each process publishes its own rows, which differ, as those of two devices do; all start together."""
    gate, opener = os.pipe()
    warm_up()
    if url.startswith("s3:"):
        import quee_core.s3_place  # noqa: F401 (a second for each fork else)
    children = [_fork(lambda mine=number: _publish_all(gate, url, mine, count)) for number in range(processes)]
    os.write(opener, b"x" * processes)
    failed = [child for child in children if os.waitpid(child, 0)[1] != 0]
    if failed:
        raise SystemExit(f"{len(failed)} of {processes} writers failed")


def _publish_all(gate: int, url: str, mine: int, count: int) -> None:
    os.read(gate, 1)
    store = Store.open(url)
    for number in range(count):
        cell = numbered_cell(number)
        table = small_table(number if mine % 2 else 1000 + number)  # half of them agree
        if store.missing([cell]):
            store.put_table(cell, table, {"writer": str(mine % 2)})
        store.get_table(cell)  # whoever was first, there is a whole one now
    if store.set_aside:
        raise SystemExit(f"a writer saw damage: {store.set_aside}")


def warm_up() -> None:
    """Load what loads at first use, so that not every fork has to."""
    Store.open("memory://warm").put_table(numbered_cell(0), small_table(0))


def unprivileged(url: str) -> None:
    give_up_capabilities()
    _report_error(lambda: _put_large(url))


def limited(url: str, size: int, what: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if what == "table":
        _report_error(lambda: _put_large(url))
    else:
        _report_error(lambda: Store.open(url).put_artefact("heads", "abc", b"short"))


def give_up_capabilities() -> None:
    """Root passes over permissions by CAP_DAC_OVERRIDE; without it, the kernel holds root to them like anybody."""
    if os.geteuid() != 0:
        return
    version_3 = 0x20080522
    header, none = (ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _put_large(url: str) -> None:
    Store.open(url).put_table(numbered_cell(0), small_table(0, images=2000, classes=20, embedding=32))


def _report_error(work: Callable[[], None]) -> None:
    try:
        work()
    except StoreError as error:
        print(error)
    else:
        raise SystemExit("nothing stopped it")


def _in_child(work: Callable[[], None]) -> int:
    return os.waitpid(_fork(work), 0)[1]


def _fork(work: Callable[[], None]) -> int:
    """The process that does `work` and ends: status 0 if it got through, 1 if it was interrupted."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except KeyboardInterrupt:
            status = 1
        except BaseException:
            traceback.print_exc()
            status = 2
        finally:
            os._exit(status)
    return child


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "write":
        write(arguments[0], int(arguments[1]))
    elif command == "stop-at-each-step":
        print(stop_at_each_step(*arguments))
    elif command == "race":
        race(arguments[0], int(arguments[1]), int(arguments[2]))
    elif command == "unprivileged":
        unprivileged(arguments[0])
    elif command == "limited":
        limited(arguments[0], int(arguments[1]), arguments[2])
    else:
        raise SystemExit(__doc__)
