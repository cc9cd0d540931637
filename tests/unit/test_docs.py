"""The documents name code; this checks that what they name is there.

Checked is what stands in `backticks` outside of code blocks, when it has the form of a path below one of our
folders, of a test (``tests/x.py::test_y``) or of a dotted name in one of our packages.
"""

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md"), *ROOT.glob("changelog.d/*.md")])

_BLOCK = re.compile(r"^ *(```|~~~).*?^ *\1", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
_PATH = re.compile(
    r"(?:\.ci|agent|bench|changelog\.d|docs|farshore|process_server|systemd|tests)/[\w./*-]*(?:::[\w:]+(?:\[.*\])?)?"
)
_DOTTED = re.compile(r"(?:agent|farshore|process_server|tests)(?:\.[A-Za-z_]\w*)+(?:\(\))?")
# agent.toml and the like are files on a server, not attributes.
_FILE_NAMES = re.compile(r".*\.(?:toml|service|timer|socket|conf|log|json|md|py|lock|deb|whl|sock|hrl)")

_ENTRY = r"[#>\-*| ]*(?:\*\*)?(I\d+[a-z]?)\b"
_INVARIANT = re.compile(rf"^{_ENTRY}.*?(?=^{_ENTRY}|\Z)", re.MULTILINE | re.DOTALL)


def spans(markdown: str) -> list[str]:
    return [" ".join(found[1].split()) for found in _SPAN.findall(_BLOCK.sub("", markdown))]


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """Return the names of the tests in a file, with their class if they are in one: ``TestX::test_y``."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                names.add(node.name)
            case ast.ClassDef():
                inner = (
                    item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
                )
                names |= {node.name, *(f"{node.name}::{item.name}" for item in inner)}
            case ast.Assign(targets=[ast.Name(id=name)]):
                names.add(name)  # TestVault = VaultMachine.TestCase, as hypothesis's rule machines do
    return frozenset(names)


def problem_with(span: str) -> str:
    """Return what is wrong with one backticked text; empty when nothing is, or it names no code of ours."""
    if _PATH.fullmatch(span):
        path, _, test = span.partition("::")
        if "*" in path:
            return "" if any(ROOT.glob(path)) else "matches no file"
        if not (ROOT / path).exists():
            return "does not exist"
        if test and test.partition("[")[0] not in names_in(ROOT / path):
            return "the file has no such test"
    elif _DOTTED.fullmatch(span) and not _FILE_NAMES.fullmatch(span):
        return "" if resolves(span.removesuffix("()")) else "cannot be resolved"
    return ""


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        name = ".".join(parts[:count])
        try:
            found: object = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # it exists and needs something that does not
            continue
        for attribute in parts[count:]:
            annotated = attribute in getattr(found, "__annotations__", {})
            if not hasattr(found, attribute) and not annotated:
                return False
            found = getattr(found, attribute, None)
        return True
    return False


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(document: Path) -> None:
    wrong = {span: why for span in spans(document.read_text()) if (why := problem_with(span))}
    assert wrong == {}


def test_every_invariant_names_the_tests_that_hold_it() -> None:
    """An entry goes from a line that begins with I and a number to the next; "(planned)" admits none."""
    document = ROOT / "docs" / "INVARIANTS.md"
    if not document.exists():
        return  # the page comes with the first part that keeps an invariant
    entries = {found[1]: found[0] for found in _INVARIANT.finditer(document.read_text())}
    assert entries, "no entry was recognised"
    without = [
        name
        for name, text in entries.items()
        if "(planned)" not in text and not any("::" in span and _PATH.fullmatch(span) for span in spans(text))
    ]
    assert without == []


@pytest.mark.parametrize(
    "span",
    [
        "farshore/extents.py",
        "tests/unit/",
        "tests/unit/test_*.py",
        "tests/unit/test_docs.py::test_a_good_span_is_accepted",
        "tests/unit/test_docs.py::test_a_good_span_is_accepted[x-y]",
        "farshore.extents.Extent.end",
        "farshore.extents.merge()",
        "farshore.errors.CorruptRecord",
        "farshore.units.MIB",
        "agent.toml",
        "farshore status",
        "farshore_rpo_seconds",
        "/var/lib/farshore",
        "c/<machine>/<seq>",
    ],
)
def test_a_good_span_is_accepted(span: str) -> None:
    assert problem_with(span) == ""


@pytest.mark.parametrize(
    "span",
    [
        "farshore/no_such.py",
        "tests/unit/no_such_*.py",
        "tests/unit/test_docs.py::test_no_such",
        "farshore.no_such",
        "farshore.extents.NoSuch",
        "farshore.extents.Extent.no_such",
    ],
)
def test_a_bad_span_is_found(span: str) -> None:
    assert problem_with(span) != ""


def test_code_blocks_are_not_looked_at() -> None:
    assert spans("a `b` c\n```\n`d`\n```\n``e`f`` g\n") == ["b", "e`f"]
