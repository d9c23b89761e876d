"""Checkpoints of the hub, looked at through their headers by the hub's own client; the hub is a server here."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from emu3 import cli
from emu3.checkpoints import NANO
from emu3.checkpoints.info import inspect, inspect_hub

pytestmark = pytest.mark.filterwarnings("ignore")  # the hub's client warns of what this server lacks


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A hub with one model, `owner/nano`. Yields the sizes of the answers that were parts of weights."""
    folder = tmp_path / "hub"
    shutil.copytree(NANO, folder)
    sizes: list[int] = []

    def stored() -> list[Path]:
        return sorted(file for file in folder.rglob("*") if file.is_file())

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self, body: bool = True) -> None:
            path = self.path.split("?")[0]
            if re.match(r"/api/models/owner/nano(/revision/\w+)?$", path):
                files = [{"rfilename": str(file.relative_to(folder)), "size": file.stat().st_size} for file in stored()]
                content = json.dumps({"id": "owner/nano", "sha": "a" * 40, "siblings": files}).encode()
                return self.answer(200, content, body)
            if found := re.match(r"/api/models/owner/nano/tree/\w+$", path):
                files = [
                    {
                        "type": "file",
                        "oid": "0" * 40,
                        "path": str(file.relative_to(folder)),
                        "size": file.stat().st_size,
                    }
                    for file in stored()
                ]
                return self.answer(200, json.dumps(files).encode(), body)
            found = re.match(r"/owner/nano/resolve/\w+/(.+)$", path)
            if found and (folder / found[1]).is_file():
                content = (folder / found[1]).read_bytes()
                if part := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                    content = content[int(part[1]) : int(part[2]) + 1]
                if found[1].endswith(".safetensors") and body:
                    sizes.append(len(content))
                return self.answer(206 if part else 200, content, body)
            return self.answer(404, b"{}", body, {"X-Error-Code": "EntryNotFound" if found else "RepoNotFound"})

        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def answer(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            told = {"Content-Length": str(len(content)), "ETag": '"0"', "X-Repo-Commit": "a" * 40, **(headers or {})}
            for name, value in told.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield sizes
    server.shutdown()
    server.server_close()


def test_the_headers_say_what_the_whole_says(served: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_hub("owner/nano") == replace(inspect(NANO), path="owner/nano")
    assert served and sum(served) < 300_000  # the client fetches 100 kB of each file
    cli.app(["info", "owner/nano", "--download", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == inspect(NANO).to_dict() | {
        "path": "owner/nano",
        "tokenizer_files": ["tokenizer.json", "tokenizer_config.json"],
        "abilities": ["draw", "read", "edit", "film", "tell"],
        "missing": [],
    }


def test_a_folder_is_looked_at_in_place(served: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    Path("owner").mkdir()
    Path("owner/nano").symlink_to(NANO)
    cli.app(["info", "owner/nano", "--download", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["path"] == "owner/nano"
    assert not served


def test_what_the_hub_does_not_have(served: list[int]) -> None:
    with pytest.raises(ValueError, match="no model 'owner/other'"):
        inspect_hub("owner/other")
    (Path("hub") / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'owner/nano' holds no model\.safetensors"):
        inspect_hub("owner/nano")
    (Path("hub") / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match="'owner/nano' is an adapter; fetch it and its base with `emu3 pull owner/nano`"
    ):
        inspect_hub("owner/nano")


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*arguments: object, **options: object) -> None:
        raise ConnectionError("timed out")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", silent)
    with pytest.raises(ValueError, match="cannot reach the hub for 'owner/nano': timed out"):
        inspect_hub("owner/nano")
