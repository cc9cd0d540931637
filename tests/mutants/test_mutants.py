"""Every seeded bug is noticed by the test that its patch names."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
PATCHES: Final = sorted(Path(__file__).parent.glob("*.patch"))
TREE: Final = ("farshore", "agent", "process_server", "tests", "docs", "pyproject.toml")


def _header(patch: Path, key: str) -> str:
    prefix = f"{key}: "
    for line in patch.read_text().splitlines():
        if line.startswith(prefix):
            return line.removeprefix(prefix)
    raise AssertionError(f"{patch.name} has no line '{prefix}…'")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("mutants") / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.patch")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignore)
        else:
            copy.mkdir(exist_ok=True)
            shutil.copy(source, copy / name)
    return copy


def _pytest(tree: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    # A temporary folder of its own: pytest also clears those of other runs, and what it cannot remove there
    # (a mount that a killed test left) makes it exit with 1, as if a test had failed.
    # Plain assertions: where CI is set pytest writes out whole differences, for a disk image in minutes.
    options = ["-q", "-x", "-p", "no:cacheprovider", "--assert=plain"]
    options.append(f"--basetemp={tree.parent / 'temporary'}")
    command = [sys.executable, "-B", "-m", "pytest", *options, *tests]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.timeout(300)
def test_without_a_bug_every_named_test_passes(tree: Path) -> None:
    done = _pytest(tree, *sorted({_header(patch, "Fails") for patch in PATCHES}))
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-1000:]}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_seeded_bug_fails_its_test(patch: Path, tree: Path) -> None:
    test = _header(patch, "Fails")
    change = ["patch", "--quiet", "--strip=1", "--input", str(patch)]
    subprocess.run(change, cwd=tree, check=True)
    try:
        done = _pytest(tree, test)
    finally:
        subprocess.run([*change, "--reverse"], cwd=tree, check=True)
    # 1 = tests ran and failed; 2 to 5 = the run itself broke, which proves nothing.
    noticed = done.returncode == 1 and "\nFAILED " in done.stdout
    assert noticed, f"{test} did not notice:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
