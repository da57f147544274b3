"""`make chaos`: rounds of chaos, a row of a table for each; ends with 1 if any of them violates what must hold."""

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.aftermath import aftermath
from tests.chaos.rounds import HEAD, Rounds, Row
from tests.chaos.surroundings import surroundings

AGAIN = 1000  # to the seed of a round, for its next try: the last digit says what befalls it
TRIES = 5  # of a round whose sweep was over before anything befell it: how long one takes differs on a busy machine
MOST_MISSED = 0.1  # of the rounds, after all tries
AT_ONCE = 8  # processes that compute the same sweep


def main() -> int:
    """Rounds as the command line asks; returns how many violations there were, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, help="of the first round, each other has the next (random)")
    parser.add_argument("--folder", type=Path, help="where servers and sweeps keep their files (a temporary one)")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends servers, and unmounts disks
    seed = random.SystemRandom().randrange(100_000) if asked.seed is None else asked.seed
    with tempfile.TemporaryDirectory(prefix="quee-chaos-", ignore_cleanup_errors=True) as scratch:
        return chaos(asked.folder or Path(scratch), asked.rounds, seed)


def chaos(folder: Path, rounds: int, seed: int) -> int:
    """Run the rounds, and print them as they end; 1 if anything is violated."""
    started = time.monotonic()
    with surroundings(folder) as around:
        played = Rounds(around)
        print(
            f"{rounds} rounds, seeds {seed} to {seed + rounds - 1}; {played.cells} cells of {played.course.entries} "
            f"entries; all is up after {time.monotonic() - started:.0f} s\n{HEAD}",
            flush=True,
        )
        wrong = killed = missed = 0
        for number in range(rounds):
            for attempt in range(TRIES):
                row = one_round(played, number + 1, seed + number + AGAIN * attempt)
                wrong += len(row.wrong)
                killed += row.silent
                print(row, flush=True)
                if not row.missed:
                    break
            missed += row.missed
        print(f"{AT_ONCE} processes at once", flush=True)
        after = [*played.at_once(AT_ONCE), *aftermath(around, killed)]
        if missed > rounds * MOST_MISSED:
            after.append(f"in {missed} of {rounds} rounds every sweep was over before anything befell it")
    print("".join(f"      {each}\n" for each in after), end="")
    wrong += len(after)
    print(f"{rounds} rounds in {time.monotonic() - started:.0f} s, {wrong} violations", flush=True)
    return 1 if wrong else 0


def one_round(played: Rounds, number: int, seed: int) -> Row:
    """A round; what ends it otherwise names it."""
    try:
        return played.run(number, seed)
    except AssertionError as error:  # something hangs, or does not start again
        sys.exit(f"round {number}, seed {seed}: {error}")
    except Exception as error:
        error.add_note(f"round {number}, seed {seed}")
        raise


if __name__ == "__main__":
    sys.exit(main())
