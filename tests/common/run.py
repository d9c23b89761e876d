"""Runs transformers' common model tests on our classes and on its own Emu3, and compares.

"Multimodal" has a whole vocabulary map, "Partial" one such as transformers' own tests have.

    python tests/common/run.py [FOLDER]      (`make common`)

The source distribution of the installed transformers is fetched into FOLDER (out/common by default), which needs the
package registry once. It lacks two mixins, for generation and export; they are empty here, so their tests do not run.

Exit code 1 if a test fails for us that passes for transformers, or if the tests could not be run.
"""

import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
MISSING = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


def fetch(folder: Path) -> Path:
    """The unpacked source distribution, with what it lacks."""
    release = f"transformers-{version('transformers')}"
    if not (folder / release).is_dir():
        command = ["download", "--quiet", "--no-deps", "--no-binary", "transformers", "--dest", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", *command, release.replace("-", "==")], check=True)
        with tarfile.open(folder / f"{release}.tar.gz") as archive:
            archive.extractall(folder / "unpacking", filter="data")
        (folder / "unpacking" / release).rename(folder / release)
    tests = folder / release / "tests"
    for path, mixin in MISSING.items():
        if not (tests / path).exists():
            (tests / path).parent.mkdir(exist_ok=True)
            (tests / path).write_text(f"class {mixin}:\n    pass\n")
    for place in (tests, *(tests / path for path in ("exporters", "generation"))):
        (place / "__init__.py").touch()
    return folder / release


def outcomes(source: Path) -> dict[tuple[str, str], str]:
    """(class, test) to "passed", "failed" or "skipped"."""
    results = source / "results.xml"
    results.unlink(missing_ok=True)
    tests = source / "test_emu3.py"
    tests.write_text((HERE / "models.py").read_text())
    options = ["-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", ".", "-W", "ignore", "--tb=short"]
    options.append(f"--junit-xml={results}")
    subprocess.run([sys.executable, "-m", "pytest", "-q", *options, tests], cwd=source)
    found = {}
    for case in ElementTree.parse(results).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[case.get("classname", "").rsplit(".", 1)[-1], case.get("name", "")] = kind
    return found


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/common").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found = outcomes(fetch(folder))
    worse = []
    for name in ("CausalLM", "Multimodal", "Partial"):
        ours, theirs = (
            {test: kind for (c, test), kind in found.items() if c == f"{whose}{name}"} for whose in ("Our", "Their")
        )
        if not ours or ours.keys() != theirs.keys():
            sys.exit(f"{name}: {len(ours)} tests ran for emu3 and {len(theirs)} for transformers; see the errors above")
        worse += [f"{name}.{test}" for test, kind in theirs.items() if kind == "passed" and ours[test] == "failed"]
        print(f"{name}: emu3 {dict(Counter(ours.values()))}, transformers {dict(Counter(theirs.values()))}")
    print("\n".join(["failing here, passing there:", *worse]) if worse else "nothing fails here that passes there")
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
