"""Every seeded bug is noticed by the test that its patch names."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.harness.warm_pytest import WarmPytest

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
def tree() -> Iterator[Path]:
    # Not below pytest's folder: the tests that run in here have sockets, whose paths are short.
    with tempfile.TemporaryDirectory(prefix="farshore-mutants-", ignore_cleanup_errors=True) as folder:
        yield copied(Path(folder) / "tree")


def copied(copy: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.patch")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignore)
        else:
            copy.mkdir(exist_ok=True)
            shutil.copy(source, copy / name)
    # Bytecode that goes by the hash of its source: a patched file may have the size, and the second, it had.
    compile_all = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash"]
    subprocess.run([*compile_all, *TREE[:4]], cwd=copy, check=True)
    return copy


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmPytest]:
    with WarmPytest() as warm:
        yield warm


def _pytest(warm: WarmPytest, tree: Path, *tests: str) -> tuple[int, str]:
    """Run ``tests`` in ``tree``; returns pytest's exit code and the end of what it printed."""
    # A temporary folder of its own: pytest also clears those of other runs, and what it cannot remove there
    # (a mount that a killed test left) makes it exit with 1, as if a test had failed.
    # Plain assertions: where CI is set pytest writes out whole differences, for a disk image in minutes.
    options = ["-q", "-x", "-p", "no:cacheprovider", "--assert=plain"]
    options.append(f"--basetemp={tree.parent / 't'}")
    output = tree.parent / "output"
    code = warm.run(tree, [*options, *tests], output, timeout_s=240)
    return code, output.read_text()[-4000:]


@pytest.mark.timeout(300)
def test_without_a_bug_every_named_test_passes(tree: Path, warm: WarmPytest) -> None:
    code, printed = _pytest(warm, tree, *sorted({_header(patch, "Fails") for patch in PATCHES}))
    assert code == 0, printed


@pytest.mark.timeout(300)
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_seeded_bug_fails_its_test(patch: Path, tree: Path, warm: WarmPytest) -> None:
    test = _header(patch, "Fails")
    change = ["patch", "--quiet", "--strip=1", "--input", str(patch)]
    subprocess.run(change, cwd=tree, check=True)
    try:
        code, printed = _pytest(warm, tree, test)
    finally:
        subprocess.run([*change, "--reverse"], cwd=tree, check=True)
    # 1 = tests ran and failed; 2 to 5 = the run itself broke, which proves nothing.
    noticed = code == 1 and "\nFAILED " in printed
    assert noticed, f"{test} did not notice:\n{printed}"
