"""A reader of the store that never sleeps long: each entry that it sees must be whole whenever it sees it."""

import json
import time
from collections import Counter
from threading import Event, Lock, Thread
from typing import Self

from tests.chaos.store_files import AWAY, Shown, StoreFiles, is_whole, manifests, shown

PAUSE = 0.1  # seconds between two looks


class Watcher:
    """Looks at `files` from a thread of its own while the block lasts. `violations`: what it saw and must not be."""

    def __init__(self, files: StoreFiles) -> None:
        self._files = files
        self._checked: dict[str, tuple[str, Shown, str]] = {}  # by manifest: its version, the entry, its data's version
        self._spoilt: set[str] = set()
        self._over, self._lock = Event(), Lock()
        self._thread = Thread(target=self._watch)
        self.violations: list[str] = []
        self.looks = 0
        self.seen: Counter[str] = Counter()  # entries that are visible, by kind

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def entries(self) -> int:
        """How many entries are visible."""
        return sum(self.seen.values())

    def spoil(self, name: str, data: bytes) -> None:
        """Put `data` in the place of a data file; that this one is damaged then is no violation."""
        with self._lock:
            self._spoilt.add(name)
            self._files.write(name, data)

    def _watch(self) -> None:
        while not self._over.is_set():
            with self._lock:
                try:
                    self._look()
                except AWAY:
                    time.sleep(PAUSE)
                except Exception as error:  # else nobody would watch, and nobody know
                    self.violations.append(f"the watcher fails: {error!r}")
                    return
            time.sleep(PAUSE)

    def _look(self) -> None:
        versions = self._files.versions()
        seen: Counter[str] = Counter()
        for name in manifests(versions):
            known = self._checked.get(name)
            if known is None or known[0] != versions[name] or known[2] != versions.get(known[1].data):
                if known is not None and known[0] != versions[name] and known[1].data not in self._spoilt:
                    self.violations.append(f"{name}: published again")
                known = self._check(name, versions)
                if known is None:
                    continue
                self._checked[name] = known
            seen[known[1].kind] += 1
        self.seen = seen
        self.looks += 1

    def _check(self, name: str, versions: dict[str, str]) -> tuple[str, Shown, str] | None:
        try:
            entry = shown(self._files, name)
        except (json.JSONDecodeError, KeyError) as error:
            self.violations.append(f"{name}: half a manifest ({error})")
            return None
        if entry is None:
            return None
        if not is_whole(self._files, entry) and entry.data not in self._spoilt and self._is_still_broken(entry):
            self.violations.append(f"{name}: visible, and its data is not what it says")
        # data that came after the listing has no version yet, and is looked at once more
        return versions[name], entry, versions.get(entry.data, "")

    def _is_still_broken(self, entry: Shown) -> bool:
        """Not so if it was set aside between the reading of manifest and data."""
        return shown(self._files, entry.manifest) == entry and not is_whole(self._files, entry)
