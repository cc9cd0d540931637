"""``vault key``: other keys that open a vault, as somebody at a shell adds, uses and removes them."""

import io
import json
import subprocess
from pathlib import Path

import pytest

from farshore.cli.main import main
from tests.harness.small_vault import SmallVault, SmallVolume

WORDS = "five words chosen by dice"


@pytest.fixture
def vault(tmp_path: Path) -> SmallVault:
    volume = SmallVolume("data", 64 * 1024)
    made = SmallVault(tmp_path / "vault", volume)
    volume.write(0, b"content " * 64)
    made.commit()
    return made


def words(vault: SmallVault, *more: object, key: Path | str | None = None) -> list[str]:
    return [*map(str, more), "--vault", vault.url, "--recovery-key-file", str(key or vault.key_file)]


def private(path: Path, content: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(content)
    return path


def holders(vault: SmallVault, capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    capsys.readouterr()
    assert main(words(vault, "vault", "key", "list", "--json")) == 0
    found = json.loads(capsys.readouterr().out)["holders"]
    assert isinstance(found, list)
    return found


def recovers(vault: SmallVault, key: Path | str, to: Path) -> int:
    code = main(words(vault, "recover", "web1", "--point", "latest", "--to", to, "--force", key=key))
    if code == 0:
        assert to.read_bytes() == bytes(vault.volumes[0].content)
    return code


def test_a_disk_comes_back_with_a_passphrase(
    vault: SmallVault, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    new = private(tmp_path / "new", f"{WORDS}\n")
    assert (
        main(words(vault, "vault", "key", "add-passphrase", "--passphrase-file", new, "--label", "me")) == 0
    )
    assert recovers(vault, private(tmp_path / "right", f"passphrase: {WORDS}\n"), tmp_path / "disk") == 0
    assert recovers(vault, private(tmp_path / "wrong", f"passphrase: {WORDS}!\n"), tmp_path / "disk") == 7
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{WORDS}\n"))
    assert recovers(vault, "-", tmp_path / "disk") == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(vault.recovery_key.format() + "\n"))
    assert recovers(vault, "-", tmp_path / "disk") == 0
    shown = holders(vault, capsys)
    assert [(holder["kind"], holder["label"]) for holder in shown][2:] == [("passphrase", "me")]
    assert main(words(vault, "vault", "key", "remove", shown[2]["id"])) == 0
    assert recovers(vault, tmp_path / "right", tmp_path / "disk") == 7
    assert WORDS not in "".join(capsys.readouterr())


def test_a_disk_comes_back_with_an_escrow_key(vault: SmallVault, tmp_path: Path) -> None:
    escrow, public = private(tmp_path / "escrow.pem", ""), tmp_path / "escrow.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "X25519", "-out", escrow], check=True)
    subprocess.run(["openssl", "pkey", "-in", escrow, "-pubout", "-out", public], check=True)
    assert recovers(vault, escrow, tmp_path / "disk") == 7
    assert main(words(vault, "vault", "key", "add-escrow", "--public-key", public)) == 0
    assert recovers(vault, escrow, tmp_path / "disk") == 0


def test_a_new_recovery_key_takes_the_place_of_the_old_one(
    vault: SmallVault, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new.key"
    assert main(words(vault, "vault", "key", "rotate", "--new-key-file", new)) == 0
    assert new.stat().st_mode & 0o777 == 0o600
    assert recovers(vault, vault.key_file, tmp_path / "disk") == 7
    assert recovers(vault, new, tmp_path / "disk") == 0
    again = main(words(vault, "vault", "key", "rotate", "--new-key-file", new, key=new))
    assert again == 6  # the file exists
    assert recovers(vault, new, tmp_path / "disk") == 0


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (("add-passphrase", "--passphrase-file", "SHORT"), 2),
        (("add-passphrase", "--passphrase-file", "/nonexistent"), 5),
        (("add-passphrase", "--passphrase-file", "GOOD", "--label", "line\nbreak"), 2),
        (("add-escrow", "--public-key", "SHORT"), 2),
        (("remove", "0" * 32), 5),
    ],
)
def test_what_makes_no_sense_is_one_line_and_changes_nothing(
    vault: SmallVault,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    code: int,
) -> None:
    files = {
        "SHORT": private(tmp_path / "short", "short\n"),
        "GOOD": private(tmp_path / "good", f"{WORDS}\n"),
    }
    before = holders(vault, capsys)
    assert main(words(vault, "vault", "key", *(files.get(word, word) for word in more))) == code
    assert capsys.readouterr().err.count("\n") == 1
    assert holders(vault, capsys) == before


def test_the_last_key_of_people_stays(vault: SmallVault, capsys: pytest.CaptureFixture[str]) -> None:
    recovery = next(holder["id"] for holder in holders(vault, capsys) if holder["kind"] == "recovery")
    assert main(words(vault, "vault", "key", "remove", recovery)) == 6
    assert "only servers could open the vault" in capsys.readouterr().err
