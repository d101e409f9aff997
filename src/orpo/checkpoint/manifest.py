"""manifest.json: what a checkpoint owns, and the proof that it is whole.

The checksums find damage (a cut file, a flipped bit, a lost write). They are no signature: who can write to the folder can write the
manifest too.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from orpo.errors import CheckpointError
from orpo.system import files as fs

_PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model*.bin", "model*.bin", "pytorch_model*.index.json")
_READ_BY_LOADERS = (
    *_PICKLED_WEIGHTS, "model*.safetensors", "adapter_model*.safetensors", "*.index.json", "config.json", "adapter_config.json",
    "trainer_state.json",
)  # fmt: skip
"""Names that the loaders look for by themselves, some of them before the weights that were saved."""

MANIFEST_NAME = "manifest.json"
FORMAT = 1
MAX_MANIFEST_BYTES = 64 * 2**20
_HASH_THREADS = 4
_DIGITS = frozenset("0123456789abcdef")

Signature = tuple[tuple[str, int, int, int, int], ...]
_verified: dict[str, Signature] = {}
"""Folders that this process has verified, with the stat of each file then: retention need not read gigabytes again at every save."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: its size in bytes and its sha256 in hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What manifest.json says.

    Attributes:
        step: optimizer steps done.
        world_size: processes that wrote it.
        files: relative POSIX name -> size and checksum, without the manifest itself.
        facts: what a resumed run must share (data fingerprint, configuration) and whatever else the trainer records.
        versions: of orpo, python, torch, transformers.
    """

    step: int
    world_size: int
    files: dict[str, FileEntry]
    facts: dict[str, Any]
    versions: dict[str, str]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(entry.bytes for entry in self.files.values())

    def to_bytes(self) -> bytes:
        """Canonical JSON that carries its own sha256, so that a damaged manifest is found too."""
        body = {
            "format": FORMAT,
            "step": self.step,
            "world_size": self.world_size,
            "versions": self.versions,
            "facts": self.facts,
            "files": {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in sorted(self.files.items())},
        }
        return (json.dumps({**body, "manifest_sha256": _digest_of(body)}, indent=1, allow_nan=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Parse and check.

        Raises:
            CheckpointError: not JSON, its own checksum differs, another format, or a name that leaves the folder.
        """
        try:
            body = json.loads(data)
            stated = body.pop("manifest_sha256")
            if stated != _digest_of(body) or body["format"] != FORMAT:
                raise CheckpointError("the manifest is damaged, or of a format this version does not know", where=where)
            files = {checked_name(name, where): _entry(entry, where) for name, entry in body["files"].items()}
            return cls(_count(body["step"]), _count(body["world_size"]), files, dict(body["facts"]), dict(body["versions"]))
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"the manifest cannot be read ({type(error).__name__}: {error})"[:300], where=where) from None


def _digest_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()).hexdigest()


def _count(value: Any) -> int:
    # `type`: True is an int to isinstance, and JSON has it.
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _entry(entry: Any, where: str) -> FileEntry:
    digest = entry["sha256"]
    if not (isinstance(digest, str) and len(digest) == 64 and _DIGITS.issuperset(digest)):
        raise CheckpointError(f"{digest!r} is not a sha256", where=where)
    return FileEntry(_count(entry["bytes"]), digest)


def checked_name(name: str, where: str) -> str:
    """The name, if it can only mean a file inside the folder.

    Raises:
        CheckpointError: absolute, with `..`, `.`, an empty part, a backslash, a drive or NUL, or the manifest itself.
    """
    path = PurePosixPath(name)
    is_confined = (
        bool(path.parts)
        and not path.is_absolute()
        and str(path) == name
        and not {".", ".."} & set(path.parts)
        and not any(mark in name for mark in ("\\", "\0", ":", "\n"))
        and name != MANIFEST_NAME
    )
    if not is_confined:
        raise CheckpointError(f"the manifest names {name!r}, which is not a file inside the checkpoint", where=where)
    return name


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, without looking at its files.

    Raises:
        CheckpointError: none there, a link, or damaged.
    """
    path = folder / MANIFEST_NAME
    if not fs.is_plain_dir(folder):
        raise CheckpointError("not a folder (a link is not followed)", where=str(folder))
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError("the manifest is not a plain file of sensible size", where=str(path))
        return Manifest.from_bytes(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"no manifest can be read ({error.strerror})", where=str(path)) from None


def hash_file(path: Path) -> FileEntry:
    """Size and sha256 of a plain file; a link is not followed."""
    # Without O_NONBLOCK opening a named pipe waits for a writer, and whoever put it there could hold a resume up for good.
    descriptor = os.open(path, fs.flags("O_RDONLY", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK"))
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is not a plain file")
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(os.fstat(file.fileno()).st_size, digest)


def hash_files(paths: Iterable[Path]) -> list[FileEntry]:
    """`hash_file` of each, a few at a time: sha256 leaves the interpreter lock, and a checkpoint has several large files."""
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return list(pool.map(hash_file, paths))


def verify(folder: Path | str) -> Manifest:
    """Prove that a checkpoint is whole: every file of its manifest is there, plain, of the stated size and checksum.

    Files that the manifest does not name are not looked at (and are never read by a resume).

    Raises:
        CheckpointError: with every problem found.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    # Forgotten first: if this check fails, an earlier one must not vouch for the folder.
    _verified.pop(str(folder.absolute()), None)
    problems = [problem for name, entry in manifest.files.items() if (problem := _shape_problem(folder, name, entry))]
    if not problems:
        # Taken before the bytes are read: what changes while they are read must not count as verified.
        before = _signature(folder, manifest)
        try:
            found = hash_files(folder / name for name in manifest.files)
        except OSError as error:
            raise CheckpointError(f"damaged checkpoint: a file cannot be read ({error})", where=str(folder)) from None
        problems = [f"{name}: checksum differs" for (name, entry), real in zip(manifest.files.items(), found, strict=True) if real != entry]
        if not problems and before is not None:
            _verified[str(folder.absolute())] = before
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError("damaged checkpoint: " + "; ".join(problems[:5]) + more, where=str(folder))
    return manifest


def is_verified(folder: Path) -> bool:
    """Whether the checkpoint verifies; what this process verified before and nothing has touched since is not read again."""
    try:
        remembered = _verified.get(str(folder.absolute()))
        if remembered is not None and remembered == _signature(folder, read_manifest(folder)):
            return True
        verify(folder)
    except (CheckpointError, OSError):
        return False
    return True


def remember_verified(folder: Path, manifest: Manifest) -> None:
    """Note that the folder's files are those of the manifest (they were just written and hashed)."""
    signature = _signature(folder, manifest)
    if signature is not None:
        _verified[str(folder.absolute())] = signature


def _shape_problem(folder: Path, name: str, entry: FileEntry) -> str | None:
    """What is wrong with a file before its content is read: absent, a link, in a linked folder, another size."""
    for parent in list(PurePosixPath(name).parents)[:-1]:
        if not fs.is_plain_dir(folder / parent):
            return f"{name}: {parent} is not a plain folder"
    try:
        status = os.lstat(folder / name)
    except OSError:
        return f"{name}: missing"
    if not stat.S_ISREG(status.st_mode):
        return f"{name}: a link or special file"
    if status.st_size != entry.bytes:
        return f"{name}: {status.st_size} bytes instead of {entry.bytes}"
    return None


def _signature(folder: Path, manifest: Manifest) -> Signature | None:
    try:
        stats = [(name, os.lstat(folder / name)) for name in [MANIFEST_NAME, *manifest.files]]
    except OSError:
        return None
    return tuple((name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns) for name, status in stats)


def require_safe_weights(folder: Path | str) -> None:
    """Refuse a folder in which the loaders would open a pickle, or a file that the manifest does not name.

    Args:
        folder: a verified checkpoint of a model that is not sharded.

    Raises:
        CheckpointError: it holds such a file.
    """
    folder = Path(folder)
    owned = {MANIFEST_NAME, *read_manifest(folder).files}
    for path in sorted(fs.walk_files(folder)):
        name = path.relative_to(folder).as_posix()
        if any(fnmatchcase(path.name, pattern) for pattern in _PICKLED_WEIGHTS):
            problem = "weights as a pickle, which is never opened"
        elif name not in owned and any(fnmatchcase(path.name, pattern) for pattern in _READ_BY_LOADERS):
            problem = "a file that its manifest does not name and that would be loaded"
        else:
            continue
        raise CheckpointError(
            f"the checkpoint holds {problem}", where=str(path), mend="remove that file, or resume from another checkpoint"
        )
