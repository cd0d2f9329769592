"""Models from the hub, with its real client: a cache made by hand, and a small hub on this machine's loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from processes import python

import peers
from dit_trt.engines.errors import UserError
from dit_trt.exporters.hub import is_hub_id, licence_of, model_files, text_encoder_files

REPO, COMMIT = "someone/a-model", "0123456789abcdef0123456789abcdef01234567"
CLIENT = """
import json, sys
from dit_trt.engines.errors import UserError
from dit_trt.exporters import hub
try:
    folder = getattr(hub, sys.argv[1])(sys.argv[2])
    files = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    print(json.dumps({"folder": str(folder), "files": files}))
except UserError as error:
    print(json.dumps({"error": str(error)}))
"""
TEXT_ENCODER = ["text_encoder/config.json", "text_encoder/model.safetensors"]
TOKENIZER = ["tokenizer/spiece.model", "tokenizer/tokenizer.json"]
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
DIFFUSERS = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{part}/config.json" for part in ("transformer", "vae", "projection_model")),
    *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae", "projection_model")),
]
BOTH = [  # as Stable Audio Open is there
    *DIFFUSERS,
    *TEXT_ENCODER,
    *TOKENIZER,
    "LICENSE.md",
    "README.md",
    ".gitattributes",
    "fma_dataset_attribution2.csv",
    "model.ckpt",
    "model.safetensors",
    "model_config.json",
    "vae_model.ckpt",
]


# -------------------- what is an id, which files are needed


def test_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for text in ("stabilityai/stable-audio-open-1.0", "a/b", "some-one/x_y.z", "0/1"):
        assert is_hub_id(text), text
    for text in (
        "demo",
        "models/mine",
        "./a/b",
        "../a",
        "/a/b",
        "a/b/c",
        "a//b",
        "a/",
        "/b",
        "~/b",
        "a/b\n",
        "a b/c",
        "",
    ):
        assert not is_hub_id(text), text
    assert not is_hub_id("a/" + "b" * 100)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (BOTH, ["model_config.json", "model_index.json", "model.safetensors", *TEXT_ENCODER, *TOKENIZER]),
        ([name for name in BOTH if name != "model.safetensors"], None),
        (
            ["model_config.json", "epoch=1.ckpt", "sub/other.ckpt", "tokenizer.json"],
            ["model_config.json", "epoch=1.ckpt", "tokenizer.json"],
        ),
        (["model_config.json", *DIFFUSERS], ["model_config.json", *DIFFUSERS]),
        ([*DIFFUSERS, *TEXT_ENCODER, "sae.ckpt"], [*DIFFUSERS, *TEXT_ENCODER]),
        (
            ["model_config.json", "model.safetensors.index.json", *SHARDS, "other-00001-of-00002.safetensors"],
            ["model_config.json", "model.safetensors.index.json", *SHARDS],
        ),
        (
            ["model_config.json", "model.ckpt", "text_encoder/config.json", "text_encoder/pytorch_model.bin"],
            ["model_config.json", "model.ckpt", "text_encoder/config.json", "text_encoder/pytorch_model.bin"],
        ),
    ],
    ids=["both", "both, ckpt", "one ckpt", "diffusers with a config", "diffusers", "shards", "bin"],
)
def test_one_layout_is_chosen(names: list[str], chosen: list[str] | None) -> None:
    if chosen is None:  # model.ckpt is the usual name, vae_model.ckpt is not
        chosen = ["model_config.json", "model_index.json", "model.ckpt", *TEXT_ENCODER, *TOKENIZER]
    found = model_files(names, REPO)
    assert sorted(found) == sorted(chosen)


def test_repositories_of_other_things() -> None:
    with pytest.raises(UserError, match=f"^{REPO} has neither model_config.json nor model_index.json"):
        model_files(["config.json", "model.safetensors"], REPO)
    with pytest.raises(UserError, match=f"^{REPO} holds no weights"):
        model_files(["model_config.json", "README.md"], REPO)
    with pytest.raises(UserError, match=rf"^{REPO} holds several files of weights \(a.ckpt, b.ckpt\)"):
        model_files(["model_config.json", "b.ckpt", "a.ckpt"], REPO)
    with pytest.raises(UserError, match=f"^{REPO}/vae holds no weights"):
        model_files([name for name in DIFFUSERS if name != "vae/diffusion_pytorch_model.safetensors"], REPO)
    with pytest.raises(UserError, match=f"^{REPO} has no config.json: no text encoder"):
        text_encoder_files(["model.safetensors"], REPO)


def test_a_text_encoder_of_its_own() -> None:
    names = ["config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "tokenizer.json", "spiece.model"]
    chosen = text_encoder_files([*names, "onnx/model.onnx", "README.md"], "t5-base")
    assert sorted(chosen) == ["config.json", "model.safetensors", "spiece.model", "tokenizer.json"]


# -------------------- licences


def test_licence_files(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == ""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert licence_of(tmp_path) == "license: mit"
    (tmp_path / "NOTICE").write_text("made by someone\n")
    (tmp_path / "LICENSE.md").write_text("be good\n")
    (tmp_path / "licences").mkdir()
    assert licence_of(tmp_path) == "be good\n\nmade by someone\n"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (
            "---\nlicense: other\nlicense_name: 'some community'\nlicense_link: LICENSE\ntags:\n- a\n---\nlicense: no",
            "license: other\nlicense_name: some community\nlicense_link: LICENSE",
        ),
        ("---\nlicense:\n- mit\n- cc0-1.0\ntags:\n- x\n---\n", "license: mit, cc0-1.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "license: mit"),
        ("---\nmodel:\n  license: mit\n---\n", ""),
        ("---\nlicense: mit\n", ""),
        ("# A model\nlicense: mit\n", ""),
        ("", ""),
    ],
)
def test_the_licence_of_a_model_card(tmp_path: Path, card: str, licence: str) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert licence_of(tmp_path) == licence


# -------------------- the real client


class Hub(ThreadingHTTPServer):
    """As much of the hub as its client asks for. `refuse` is (status, X-Error-Code, X-Error-Message) to all."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, str]] = {}
        self.refuse: tuple[int, str, str] | None = None
        self.refused_names: tuple[str, ...] = ()
        self.fetched: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.server.tokens.add(self.headers.get("Authorization"))
        api = parts[:2] == ["api", "models"]
        repo_id, _, rest = "/".join(parts[2:] if api else parts).partition("/tree/" if api else "/resolve/")
        repo_id = repo_id.partition("/revision/")[0]
        name = rest.partition("/")[2]
        if self.server.refuse is not None and (not self.server.refused_names or name in self.server.refused_names):
            status, code, message = self.server.refuse
            return self._send(status, b"{}", with_body, {"X-Error-Code": code, "X-Error-Message": message})
        if (files := self.server.repos.get(repo_id)) is None:
            return self._send(404, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})
        if api and rest:
            content = [{"type": "file", "path": n, "size": len(t), "oid": f"{hash(n):x}"} for n, t in files.items()]
            return self._send(200, json.dumps(content).encode(), with_body)
        if api:
            content = {"id": repo_id, "modelId": repo_id, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
            return self._send(200, json.dumps(content).encode(), with_body)
        if name not in files:
            return self._send(404, b"", with_body, {"X-Error-Code": "EntryNotFound"})
        if with_body:
            self.server.fetched.append(name)
        headers = {"ETag": f'"{name.encode().hex()}"', "X-Repo-Commit": COMMIT}
        return self._send(200, files[name].encode(), with_body, headers)

    def _send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, whatever the settings of this machine."""
    peers.require("huggingface_hub")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    return tmp_path / "hf" / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def contents(names: list[str]) -> dict[str, str]:
    return {name: f"content of {name}" for name in names}


def ask(function: str = "fetch_model", repo_id: str = REPO) -> dict:
    finished = python(CLIENT, (function, repo_id))
    assert finished.returncode == 0, finished.stderr
    answer = json.loads(finished.stdout.splitlines()[-1])
    assert "\n" not in answer.get("error", "")
    return answer


def write_cache(cache: Path, names: list[str], repo_id: str = REPO) -> Path:
    """A repository as the hub's client keeps it."""
    repo = cache / ("models--" + repo_id.replace("/", "--"))
    snapshot = repo / "snapshots" / COMMIT
    for name, text in contents(names).items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_text(text)
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_only_one_layout_is_fetched(hub: Hub) -> None:
    hub.repos[REPO] = contents(BOTH)
    answer = ask()
    wanted = [*model_files(BOTH, REPO), "LICENSE.md", "README.md"]
    assert answer["files"] == contents(wanted)
    assert sorted(hub.fetched) == sorted(wanted)
    assert Path(answer["folder"]).name == COMMIT
    hub.fetched.clear()
    assert ask() == answer
    assert hub.fetched == []  # the cache has it


def test_a_name_with_wildcards_in_it_is_that_name(hub: Hub) -> None:
    hub.repos[REPO] = contents(["model_config.json", "epoch=[1].safetensors", "epoch=1.safetensors.txt"])
    assert ask()["files"] == contents(["model_config.json", "epoch=[1].safetensors"])


def test_the_token_is_sent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[REPO] = contents(["model_config.json", "model.safetensors"])
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "files" in ask()
    assert hub.tokens == {"Bearer hf_secret"}


def test_a_text_encoder_is_fetched(hub: Hub) -> None:
    hub.repos["t5-base"] = contents(["config.json", "model.safetensors", "tokenizer.json", "tf_model.h5"])
    assert ask("fetch_text_encoder", "t5-base")["files"] == contents(
        ["config.json", "model.safetensors", "tokenizer.json"]
    )


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        (
            (403, "GatedRepo", "Access to model is restricted"),
            "is gated: accept its licence on the model's page, then set",
        ),
        (
            (401, "GatedRepo", "Access to model is restricted"),
            "is gated: accept its licence on the model's page, then set",
        ),
        ((401, "", "Invalid credentials in Authorization header"), "the hub does not accept the token (HF_TOKEN"),
        ((401, "RepoNotFound", ""), "the hub has no such model, or a private one"),
        ((404, "RepoNotFound", "Repository not found"), "the hub has no such model, or a private one"),
        ((403, "", "Forbidden"), "the token may not read this model"),
        ((418, "", ""), "the hub answers with status 418; try again later"),
    ],
)
def test_refusals_of_the_hub(hub: Hub, refuse: tuple[int, str, str], words: str) -> None:
    hub.refuse = refuse
    error = ask()["error"]
    assert error.startswith(REPO) and words in error


def test_a_gated_model_whose_description_is_open(hub: Hub) -> None:
    """As the hub does it: whoever asks may list the files."""
    hub.repos[REPO] = contents(BOTH)
    hub.refuse, hub.refused_names = (403, "GatedRepo", "restricted"), ("model.safetensors",)
    error = ask()["error"]
    assert error == f"{REPO} is gated: accept its licence on the model's page, then set HF_TOKEN or run `hf auth login`"
    hub.refuse = None
    assert "model.safetensors" in ask()["files"]  # what was begun is finished


def test_what_is_cached_needs_no_token(hub: Hub) -> None:
    hub.repos[REPO] = contents(BOTH)
    answer = ask()
    hub.refuse = (403, "GatedRepo", "restricted")
    assert ask() == answer


def test_no_model_of_ours(hub: Hub) -> None:
    hub.repos[REPO] = contents(["config.json", "model.safetensors"])
    assert ask()["error"].startswith(f"{REPO} has neither model_config.json nor model_index.json")
    assert "model.safetensors" not in hub.fetched
    assert ask(repo_id="a/b/c")["error"] == "'a/b/c' is no id of a model on the hub: those are owner/name"


def test_a_cached_model_offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = ["model_config.json", "model.safetensors", "LICENSE"]
    snapshot = write_cache(cache, names)
    assert ask() == {"folder": str(snapshot), "files": contents(names)}
    write_cache(cache, ["config.json", "pytorch_model.bin"], "t5-base")
    assert ask("fetch_text_encoder", "t5-base")["files"] == contents(["config.json", "pytorch_model.bin"])


@pytest.mark.parametrize("names", [[], ["model_config.json"], ["README.md"]], ids=str)
def test_what_is_not_cached_offline(cache: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if names:
        write_cache(cache, names)
    error = ask()["error"]
    assert error == f"{REPO} is not whole in the local cache, and HF_HUB_OFFLINE is set: unset it to fetch it"


def test_a_half_fetched_model_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[REPO] = contents(BOTH)
    hub.refuse, hub.refused_names = (403, "GatedRepo", "restricted"), ("model.safetensors",)
    assert "error" in ask()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in ask()["error"]


def test_without_network(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    error = ask()["error"]
    assert error.startswith(f"{REPO} is not whole in the local cache, and the hub cannot be reached (ConnectError)")
    write_cache(cache, ["model_config.json", "model.safetensors"])
    assert ask()["files"] == contents(["model_config.json", "model.safetensors"])


def test_the_extra_is_missing() -> None:
    finished = python(CLIENT, ("fetch_model", REPO), without=("huggingface_hub",))
    assert finished.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'huggingface_hub'"
