"""Runs the tests that transformers could break under several of its releases, each in an environment of its own.

    python tests/versions.py [RELEASE ...]      (`make versions`: all of RELEASES)

A release is a number, or "newest", which is whatever the package registry has today. An environment is made anew in
out/versions/RELEASE, with the extra `test` and the pins of constraints.txt, except for what belongs to transformers.
Prints one line a release; exit code 1 if a test fails.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RELEASES = ("5.16.1", "5.23.0", "newest")
# What a release of transformers chooses itself.
FREE = {"transformers", "huggingface_hub", "tokenizers", "hf-xet"}
SUITES = [
    "tests/parity",
    "tests/training/test_language.py",
    "tests/training/test_sequences.py",
    "tests/modeling",
    "tests/generation/test_parity.py",
    "tests/generation/test_tensor_parallel.py",
    "tests/test_nano.py",
    "tests/checkpoints/test_baai.py",
    "tests/checkpoints/test_load.py",
    "tests/checkpoints/test_quantize.py",
    "tests/test_configuration.py",
    "tests/test_docs.py",
    "tests/test_documentation_examples.py",
    "tests/test_ecosystem.py",
    "tests/test_image_processing_inputs.py",
    "tests/test_processing.py",
    "tests/test_processing_documented.py",
    "tests/test_register.py",
]


def environment(release: str) -> Path:
    """The Python of a fresh environment with this release."""
    folder = ROOT / "out" / "versions" / release
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in pins if re.split("==|#", line)[0].strip() not in FREE]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(kept) + "\n")
    python = folder / "bin" / "python"
    wanted = "transformers" if release == "newest" else f"transformers=={release}"
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade", "--constraint", constraints]
    subprocess.run([*install, "--editable", f"{ROOT}[test]", wanted], check=True)
    return python


def run(release: str) -> bool:
    """Whether every test passes under a release."""
    began = time.monotonic()
    python = environment(release)
    installed = time.monotonic()
    ask = "import importlib.metadata as m; print(m.version('transformers'))"
    version = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    arguments = ["-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile"]
    done = subprocess.run([python, "-m", "pytest", *arguments, *SUITES], cwd=ROOT)
    verdict = "passed" if done.returncode == 0 else "FAILED"
    took = f"environment {(installed - began) / 60:.1f} min, tests {(time.monotonic() - installed) / 60:.1f} min"
    print(f"transformers {version}: {verdict} ({took})", flush=True)
    return done.returncode == 0


def main() -> None:
    results = [run(release) for release in sys.argv[1:] or RELEASES]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
