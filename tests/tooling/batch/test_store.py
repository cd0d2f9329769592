"""A store's files are whole under their names, whatever it is made of; what cannot be opened says what to do."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from hearing import installed

from dit_trt.engines.errors import UserError
from dit_trt.tooling.batch.store import LocalStore, UriStore, open_store


@pytest.fixture(autouse=True)
def _fsspec() -> None:
    installed("fsspec", 'pip install -e ".[ray]"')


@pytest.fixture(params=["folder", "file", "memory", "moved"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param in ("folder", "file"):
        return f"{tmp_path}/a b" if request.param == "folder" else f"file://{tmp_path}/a%20b"
    if request.param == "moved":  # as a system that shows an upload before it is whole
        monkeypatch.setattr("dit_trt.tooling.batch.store.WHOLE_UPLOADS", set())
    return f"memory://{uuid.uuid4().hex}/clips/"


def test_what_is_written_is_read(place: str) -> None:
    store = open_store(place)
    with store.held():
        assert store.names() == set() and store.read("a.wav") is None
        store.write("a.wav", b"first")
        store.write("a.wav", b"one")
        store.write("b", b"")
        assert store.names() == {"a.wav", "b"}
        assert (store.read("a.wav"), store.read("b")) == (b"one", b"")
    again = open_store(place)
    assert again.names() == {"a.wav", "b"}
    assert again.sha256("b") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_folder_is_appended_to(tmp_path: Path) -> None:
    store = open_store(f"file://localhost{tmp_path}")
    assert isinstance(store, LocalStore) and store.append is not None
    store.write("x", b"")
    store.append("x", "a\n")
    store.append("x", "b\n")
    assert store.read("x") == b"a\nb\n"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    name = uuid.uuid4().hex
    for store, left in ((open_store(str(tmp_path)), ".{}.7.tmp"), (open_store(f"memory://{name}"), ".{}.tmp")):
        for file in (left.format("a.wav"), left.format("b.wav"), "b.wav", ".notes"):
            store.write(file, b"half")
        store.sweep("a.wav")
        assert store.names() == {left.format("b.wav"), "b.wav", ".notes"}
        store.sweep()
        assert store.names() == {"b.wav", ".notes"}


def test_an_upload_that_fails_leaves_no_file_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr("dit_trt.tooling.batch.store.WHOLE_UPLOADS", set())
    store, upload = open_store(f"memory://{uuid.uuid4().hex}"), MemoryFileSystem.pipe_file

    def broken(self: MemoryFileSystem, path: str, value: bytes, **more: object) -> None:
        upload(self, path, value[:2], **more)
        raise OSError("the line went dead")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", broken)
    with pytest.raises(UserError, match=r"^--output memory://\w+ cannot be written into \(a\): OSError: the line"):
        store.write("a", b"whole")
    assert store.names() == {".a.tmp"} and store.read("a") is None


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "nonsense://a/b",
            r"--output nonsense://a/b cannot be opened \(Protocol not known: nonsense\); the scheme is",
        ),
        ("file://elsewhere/a", r"names no folder of this machine; write file:///folder"),
        ("file://", r"names no folder of this machine; write file:///folder"),
        ("://x", r"--output ://x has no scheme; write file:///folder, s3://bucket/folder, or"),
        ("/dev/null/x", r"cannot write into /dev/null/x: Not a directory; choose another --output"),
        ("/dev/null", r"--output /dev/null is a file; give a folder"),
    ],
)
def test_bad_places(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message), open_store(uri).held():
        pass


def test_a_password_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    uri = "ftp://me:se:cr@et@host:21/a"
    bad = ["nonsense://me:secret@host/a", "file://me:secret@host/a", "://me:secret@host/a"]
    for each in bad:
        with pytest.raises(UserError, match=r"--output \w*://me:\*\*\*@host/a ") as error:
            open_store(each)
        assert "secret" not in str(error.value)
    with pytest.raises(UserError, match=r"--output nonsense://host/a\?\*\*\* ") as error:
        open_store("nonsense://host/a?key=secret&also=secret")
    assert "secret" not in str(error.value)

    def no_list(*_: object, **__: object) -> None:
        raise OSError(f"no answer from {uri}")

    monkeypatch.setattr("fsspec.core.url_to_fs", lambda uri: (MemoryFileSystem(), "/a"))
    monkeypatch.setattr(MemoryFileSystem, "ls", no_list)
    store = UriStore(uri)
    assert store.place == "ftp://me:***@host:21/a"
    with pytest.raises(UserError, match="OSError: no answer from ftp://me") as error:
        store.names()
    assert "cr@et" not in str(error.value)
    for kept in ("abfs://box@account/a", "s3://bucket/a:b@c"):
        assert UriStore(kept).place == kept


def test_a_missing_plugin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(uri: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(UserError, match=r"--output s3://b/c: Install s3fs to access S3; pip install what it names"):
        UriStore("s3://b/c")
