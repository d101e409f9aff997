"""A model of a disk that forgets: records the file operations of a save and builds every state that a power cut may leave.

What is modelled, after POSIX and the journaling file systems: a file's content is safe once the file was synced; before that it may be
there, be missing, be cut or be zeros. A folder's entries (new names, renames, removals) become durable in their order, and surely at the
latest when the folder was synced; each folder by itself. A rename within one folder is one entry.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orpo.system import files as fs

Op = tuple[Any, ...]


class Recorder:
    """Writes down what happens under `base`: the operations of the seam, and before each what was changed past it (the weights)."""

    def __init__(self, base: Path, patch: pytest.MonkeyPatch) -> None:
        self.base = base
        self.ops: list[Op] = []
        self._known: dict[str, bytes | None] = {}
        self._known = self._tree()
        for name in ("make_dir", "write_file", "sync_file", "sync_dir", "rename", "unlink", "remove_dir"):
            patch.setattr(fs, name, self._wrap(name, getattr(fs, name)))

    def start(self) -> Disk:
        """The disk as it is now, all of it durable."""
        self.ops.clear()
        self._known = self._tree()
        return Disk.of(self._known)

    def mark(self, label: str) -> None:
        """Note a moment (`publish` has returned)."""
        self._note_changes()
        self.ops.append(("mark", label))

    def _wrap(self, name: str, real: Callable[..., None]) -> Callable[..., None]:
        def recorded(*args: Any) -> None:
            self._note_changes()
            real(*args)
            paths = [argument.relative_to(self.base).as_posix() for argument in args if isinstance(argument, Path)]
            if name == "write_file":
                self.ops += [("create", paths[0]), ("data", paths[0], args[1]), ("sync_file", paths[0])]
            else:
                self.ops.append((name, *paths))
            self._known = self._tree()

        return recorded

    def _note_changes(self) -> None:
        now = self._tree()
        for path in [path for path in self._known if path not in now]:
            raise AssertionError(f"{path} was removed past the seam")
        for path, content in now.items():
            if path not in self._known:
                self.ops.append(("make_dir", path) if content is None else ("create", path))
            if content is not None and self._known.get(path) != content:
                self.ops.append(("data", path, content))
        self._known = now

    def _tree(self) -> dict[str, bytes | None]:
        """Paths under base, parents first; None for folders."""
        found = sorted(self.base.rglob("*"), key=lambda path: path.parts)
        return {path.relative_to(self.base).as_posix(): None if path.is_dir() else path.read_bytes() for path in found}


@dataclass(eq=False)
class Node:
    """A file or a folder, as programs see it (`now`) and as it surely is on the disk (`safe`)."""

    is_dir: bool
    now: Any = None
    safe: Any = None
    pending: list[tuple[Any, ...]] = field(default_factory=list)
    """Folders: entries not yet durable, in order."""


class Disk:
    """Applies recorded operations, then is asked what a crash may leave."""

    def __init__(self) -> None:
        self.root = Node(True, {}, {})

    @classmethod
    def of(cls, tree: dict[str, bytes | None]) -> Disk:
        disk = cls()
        for path, content in tree.items():
            parent, name = disk._parent(path)
            node = Node(True, {}, {}) if content is None else Node(False, content, content)
            parent.now[name] = parent.safe[name] = node
        return disk

    def _parent(self, path: str) -> tuple[Node, str]:
        node = self.root
        *parents, name = path.split("/")
        for part in parents:
            node = node.now[part]
        return node, name

    def _node(self, path: str) -> Node:
        if path == ".":
            return self.root
        parent, name = self._parent(path)
        return parent.now[name]

    def apply(self, op: Op) -> None:
        kind, *args = op
        if kind == "mark":
            return
        if kind in ("make_dir", "create"):
            parent, name = self._parent(args[0])
            parent.now[name] = Node(True, {}, {}) if kind == "make_dir" else Node(False, b"", b"")
            parent.pending.append(("link", name, parent.now[name]))
        elif kind == "data":
            self._node(args[0]).now = args[1]
        elif kind == "sync_file":
            node = self._node(args[0])
            node.safe = node.now
        elif kind == "sync_dir":
            node = self._node(args[0])
            node.safe, node.pending = dict(node.now), []
        elif kind in ("unlink", "remove_dir"):
            parent, name = self._parent(args[0])
            del parent.now[name]
            parent.pending.append(("drop", name))
        elif kind == "rename":
            (parent, name), (target, new_name) = self._parent(args[0]), self._parent(args[1])
            node = parent.now.pop(name)
            target.now[new_name] = node
            if parent is target:
                parent.pending.append(("move", name, new_name, node))
            else:
                target.pending.append(("link", new_name, node))
                parent.pending.append(("drop", name))
        else:
            raise AssertionError(kind)

    def leave(self, choose_entries: Callable[[int], int], choose_data: Callable[[bytes, bytes], bytes]) -> dict[str, bytes | None]:
        """A tree that a crash may leave: how many pending entries of each folder made it, and what became of unsynced content."""
        tree: dict[str, bytes | None] = {}

        def visit(node: Node, prefix: str) -> None:
            entries = dict(node.safe)
            for kind, name, *rest in node.pending[: choose_entries(len(node.pending))]:
                if kind == "link":
                    entries[name] = rest[0]
                elif kind == "drop":
                    entries.pop(name, None)
                else:
                    entries.pop(name, None)
                    entries[rest[0]] = rest[1]
            for name, child in entries.items():
                path = prefix + name
                if child.is_dir:
                    tree[path] = None
                    visit(child, path + "/")
                else:
                    tree[path] = child.safe if child.safe == child.now else choose_data(child.safe, child.now)

        visit(self.root, "")
        return tree


def crash_states(disk: Disk, ops: list[Op], *, seed: int, num_random: int = 12) -> Iterator[tuple[int, dict[str, bytes | None]]]:
    """(operations done, tree) for every prefix of the operations: the worst, the best, and random states in between, each once."""
    chance = random.Random(seed)
    seen: set[tuple[int, str]] = set()
    for done in range(len(ops) + 1):
        if done:
            disk.apply(ops[done - 1])
        for tree in _states(disk, chance, num_random):
            key = (done, hashlib.sha256(repr(sorted(tree.items(), key=lambda item: item[0])).encode()).hexdigest())
            if key not in seen:
                seen.add(key)
                yield done, tree


def _states(disk: Disk, chance: random.Random, num_random: int) -> Iterator[dict[str, bytes | None]]:
    yield disk.leave(lambda number: 0, lambda safe, now: safe)
    yield disk.leave(lambda number: number, lambda safe, now: safe)
    yield disk.leave(lambda number: number, lambda safe, now: bytes(len(now)))
    yield disk.leave(lambda number: number, lambda safe, now: now)
    for _ in range(num_random):
        yield disk.leave(
            lambda number: chance.randint(0, number),
            lambda safe, now: chance.choice([safe, now, bytes(len(now)), now[: chance.randint(0, len(now))]]),
        )


def build(tree: dict[str, bytes | None], folder: Path) -> Path:
    """Write a tree into an empty folder."""
    folder.mkdir()
    for path, content in sorted(tree.items()):
        target = folder / path
        if content is None:
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    return folder
