"""Environments, settings, servers and pictures to compare with, for the scripts beside this file."""

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from openai import OpenAI
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "out" / "clients"
CAR = "a photo of a red car"
SEED = 7


def environment(folder: Path, *packages: str) -> Path:
    """The bin folder of a virtual environment with these packages, which is made where it is not there yet."""
    stamp = folder / "installed.txt"  # written last, so an interrupted installation starts again
    wanted = "\n".join(packages)
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"installing {', '.join(packages)} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages], check=True)
        stamp.write_text(wanted)
    return folder / "bin"


def documented(start: str, address: str) -> str:
    """The block of docs/serve.md that begins so, with another address of emu3."""
    page = (ROOT / "docs" / "serve.md").read_text()
    (block,) = re.findall(rf"^```\w+\n({re.escape(start)}.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert "http://127.0.0.1:8000" in block
    return block.replace("http://127.0.0.1:8000", address)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def pixels(content: bytes | str) -> bytes:
    """Of a PNG that nano drew, as it is or in base64."""
    picture = Image.open(io.BytesIO(base64.b64decode(content) if isinstance(content, str) else content))
    assert (picture.format, picture.size) == ("PNG", (48, 48)), picture
    return picture.convert("RGB").tobytes()


def drawn_directly(address: str, prompt: str) -> str:
    """The picture of a prompt and SEED in base64, as emu3 gives it when it is asked itself."""
    with OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        return client.images.generate(prompt=prompt, extra_body={"seed": SEED}).data[0].b64_json


class Servers:
    """Servers that run until the block ends, however it ends. Their output goes to files in `logs`."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs

    def __enter__(self) -> "Servers":
        self._running: list[subprocess.Popen] = []
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        return self

    def __exit__(self, *_: object) -> None:
        # Each has a process group of its own, for what it started itself.
        for server in self._running:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
        for server in self._running:
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()

    def start(self, name: str, command: list[str | Path], health: str, **variables: str) -> None:
        """Start a server, and wait until the address `health` answers."""
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{name}.log"
        with log.open("w") as output:
            server = subprocess.Popen(
                command, stdout=output, stderr=output, env=os.environ | variables, start_new_session=True
            )
        self._running.append(server)
        end = time.monotonic() + 300
        while not _answers(health):
            if server.poll() is not None or time.monotonic() > end:
                sys.exit(f"{name} did not start; the end of {log}:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)

    def emu3(self) -> str:
        """Start `emu3 serve nano`: its address."""
        port = free_port()
        address = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "emu3", "serve", "nano", "--port", str(port)]
        self.start("emu3", command, f"{address}/ready")
        return address


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
