import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from farshore.config import CONFIG_BYTES_MAX, create_private, load_config, parse_config, write_private
from farshore.errors import ConfigError, Failed


class Store(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    url: str
    timeout_s: float = 30.0


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    store: Store
    volumes: list[str] = []


GOOD = b'volumes = ["vda"]\n[store]\nurl = "file:///v"\n'


def test_a_file_becomes_settings_with_defaults(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_bytes(GOOD)
    assert load_config(path, Settings) == Settings(Store("file:///v", 30.0), ["vda"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "missing required field `store`"),
        (b'[store]\nurl = "x"\nbuket = 1\n', "store: Object contains unknown field `buket`"),
        (b"[store]\nurl = 1\n", "store.url: Expected `str`, got `int`"),
        (b'volumes = [1]\n[store]\nurl = "x"\n', "volumes[0]: Expected `str`"),
        (b"store = \n", "line 1, column 9"),
        (b"\xef\xbb\xbf" + GOOD, "byte order mark"),
        (b"# \xff\n" + GOOD, "byte 2 is not UTF-8"),
        (b"#" * CONFIG_BYTES_MAX + b"\n" + GOOD, f"larger than {CONFIG_BYTES_MAX} bytes"),
    ],
)
def test_an_error_names_file_key_and_reason(tmp_path: Path, text: bytes, why: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, Settings)
    assert caught.value.where == str(path)
    assert why in caught.value.why
    assert caught.value.exit_code == 3


def test_what_is_no_readable_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name, why in [
        ("absent", "no such file"),
        (".", "a directory"),
        ("fifo", "not a regular file"),
        ("loop", "symbolic links"),
    ]:
        with pytest.raises(ConfigError, match=why):
            load_config(tmp_path / name, Settings)


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:  # root, whom CI runs as, reads everything
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=r"agent\.toml: Permission denied"):
        load_config(tmp_path / "agent.toml", Settings)


def test_settings_that_would_let_a_typo_pass_are_our_mistake(tmp_path: Path) -> None:
    class Loose(msgspec.Struct, frozen=True):
        url: str = ""

    with pytest.raises(TypeError, match="Loose must be frozen and forbid unknown fields"):
        load_config(tmp_path / "x", Loose)


def test_text_from_elsewhere_is_named_by_its_caller() -> None:
    with pytest.raises(ConfigError, match=r"policy gold: .*unknown field"):
        parse_config(b"x = 1", Settings, where="policy gold")


def test_a_private_file_is_whole_private_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "token"
    old_mask = os.umask(0)
    try:
        write_private(path, b"one")
        write_private(path, b"two")
    finally:
        os.umask(old_mask)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["token"]


def test_writing_replaces_a_link_and_leaves_its_target_alone(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"theirs")
    link.symlink_to(target)
    write_private(link, b"ours")
    assert (target.read_bytes(), link.read_bytes(), link.is_symlink()) == (b"theirs", b"ours", False)


def test_creating_never_replaces(tmp_path: Path) -> None:
    path = tmp_path / "key"
    create_private(path, b"one")
    with pytest.raises(FileExistsError):
        create_private(path, b"two")
    assert path.read_bytes() == b"one"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_a_refused_write_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"cannot write: .*/absent/token: No such file"):
        write_private(tmp_path / "absent" / "token", b"x")


@pytest.mark.needs("strace")
def test_content_is_durable_before_its_name_and_the_name_before_the_return(tmp_path: Path) -> None:
    log = tmp_path / "trace"
    program = (
        "import sys; from pathlib import Path; from farshore.config import write_private\n"
        "write_private(Path(sys.argv[1]), b'x')"
    )
    subprocess.run(
        [
            "strace",
            "-f",
            "-o",
            str(log),
            "-e",
            "trace=fsync,rename",
            sys.executable,
            "-c",
            program,
            str(tmp_path / "f"),
        ],
        check=True,
        cwd=Path(__file__).parents[2],
    )
    calls = [line.split(maxsplit=1)[1].split("(")[0] for line in log.read_text().splitlines() if "(" in line]
    assert calls[-3:] == ["fsync", "rename", "fsync"]
