"""Where clips go: a folder, or whatever fsspec opens by its URI. What has its final name there is whole.

| place | how a file is written |
|---|---|
| a folder, `file://` | under another name beside it, flushed to the disk, renamed |
| object stores (`s3://`, `gs://`, ...), `memory://` | at once under its name: an upload is seen whole or not at all |
| others (`sftp://`, ...) | under another name, then moved by fsspec, which may copy where the system cannot rename |

Only the first can be locked and appended to. Elsewhere an index is written anew from time to time, see `ClipFolder`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from ...engines.errors import UserError, last_line
from ...engines.home import expanded, flocked, sha256, sweep, write_whole

# fsspec's names of what shows an upload when it is complete, and not before.
WHOLE_UPLOADS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "hf", "memory"}


class Store(Protocol):
    """Files by name. Raises UserError for what cannot be read or written."""

    place: str

    def names(self) -> set[str]: ...

    def read(self, name: str) -> bytes | None:
        """None when it is not there."""
        ...

    def write(self, name: str, content: bytes) -> None: ...

    @property
    def append(self) -> Callable[[str, str], None] | None:
        """Add text, a whole line or more, to the file of a name; it is on the disk then. None where that cannot be."""
        ...

    def sha256(self, name: str) -> str: ...

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keep others out where that is possible."""
        ...

    def sweep(self, name: str | None = None) -> None:
        """Remove what killed processes left of that file, or of any; no other process may be at them."""
        ...


class LocalStore:
    """A folder on this machine, made when something is written into it."""

    def __init__(self, folder: Path):
        self.folder, self.place = folder, str(folder)

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()

    def read(self, name: str) -> bytes | None:
        path = self.folder / name
        return path.read_bytes() if path.is_file() else None

    def write(self, name: str, content: bytes) -> None:
        self._make()
        with self._writing(name):
            write_whole(self.folder / name, content)

    def append(self, name: str, text: str) -> None:
        with self._writing(name), (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def sha256(self, name: str) -> str:
        return sha256(self.folder / name)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._make()
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(flocked(self.folder, wait=False))
            except BlockingIOError:
                raise UserError(f"another process is generating into {self.folder}; wait for it") from None
            yield

    def sweep(self, name: str | None = None) -> None:
        sweep(self.folder, name)

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write into {self.folder}: {error.strerror}; choose another --output") from None

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"cannot write {self.folder / name}: {reason}; make room or choose another place with --output, and "
                "the same command goes on"
            ) from error


class UriStore:
    """A folder that fsspec opens. Two processes at one are not kept apart, nor is what is there read again to check."""

    append = None  # an object is whole, or not there

    def __init__(self, uri: str):
        import fsspec

        self.place, shown = _shown(uri.rstrip("/")), _shown(uri)
        scheme = uri.partition("://")[0]
        try:
            found: tuple[Any, str] = fsspec.core.url_to_fs(uri)
        except ImportError as error:
            raise UserError(f"--output {shown}: {_shown(last_line(error))}; pip install what it names") from None
        except Exception as error:  # of every file system its own
            known = "file, s3, gs or another of fsspec's, see fsspec.available_protocols()"
            why = _shown(last_line(error))
            raise UserError(f"--output {shown} cannot be opened ({why}); the scheme is {known}") from None
        self._system, path = found
        self._folder = path.rstrip("/")
        self._at_once = scheme in WHOLE_UPLOADS

    def names(self) -> set[str]:
        with self._told("be listed"):
            self._system.invalidate_cache()
            try:
                found = self._system.ls(self._folder, detail=False)
            except FileNotFoundError:
                return set()
            return {str(each).rstrip("/").rpartition("/")[2] for each in found}

    def read(self, name: str) -> bytes | None:
        with self._told(f"be read ({name})"):
            try:
                return self._system.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        with self._told(f"be written into ({name})"):
            if self._at_once:
                self._system.pipe_file(self._path(name), content)
                return
            part = self._path(_part(name))
            self._system.pipe_file(part, content)
            self._system.mv(part, self._path(name))

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.read(name) or b"").hexdigest()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        if not self._at_once:  # object stores have no folders
            with self._told("be written into"):
                self._system.makedirs(self._folder, exist_ok=True)
        yield

    def sweep(self, name: str | None = None) -> None:
        left = {each for each in self.names() if each.startswith(".") and each.endswith(".tmp")}
        for part in left if name is None else left & {_part(name)}:
            with self._told(f"be written into ({part})"):
                self._system.rm_file(self._path(part))

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Every file system has exceptions of its own."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {_shown(last_line(error))}"
            raise UserError(f"--output {self.place} cannot {what}: {reason}; the same command goes on") from error


def _shown(text: str) -> str:
    """Without the passwords and queries of its URIs: keys and signatures stand there."""
    text = re.sub(r"://([^/:@\s]*):[^/\s]*@", r"://\1:***@", text)
    return re.sub(r"(://[^\s?]*\?)[^\s'\"]+", r"\1***", text)


def _part(name: str) -> str:
    return f".{name}.tmp"


def open_store(output: str) -> Store:
    """A folder's path, or a URI with a scheme. Raises UserError, naming the fix, for one that cannot be opened."""
    scheme, has_scheme, _ = output.partition("://")
    shown = _shown(output)
    if not has_scheme:
        return LocalStore(_folder(expanded(output), output))
    if not scheme:
        raise UserError(f"--output {shown} has no scheme; write file:///folder, s3://bucket/folder, or a folder's path")
    if scheme == "file":
        parts = urlsplit(output)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise UserError(f"--output {shown} names no folder of this machine; write file:///folder")
        return LocalStore(_folder(Path(unquote(parts.path)), output))
    return UriStore(output)


def _folder(path: Path, output: str) -> Path:
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {output} is a file; give a folder")
    return path
