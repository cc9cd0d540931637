"""What a bucket may answer, as the client library tells it, and which error of ours each is.

The answers come from a server of the test's own: no store can be made to give most of them.
"""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from farshore.errors import CapacityError, ConfigError, Failed, FarshoreError, NotFound, Unreachable
from process_server.vault.store.address import parse_object_address
from process_server.vault.store.object import ObjectStore
from process_server.vault.store.protocol import AlreadyExists, Precondition
from tests.harness.object_stores import AZURE_KEYS, S3_KEYS

Reply = Callable[[str], bytes]

OBJECT = b'ETag: "1"\r\nLast-Modified: Sat, 21 Nov 2026 17:55:10 GMT\r\n'


def reply(status: int, code: str = "", headers: bytes = b"", body: bytes = b"") -> bytes:
    if code:
        body = f'<?xml version="1.0"?>\n<Error><Code>{code}</Code></Error>'.encode()
    head = f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n".encode()
    return head + headers + b"\r\n" + body


@contextlib.contextmanager
def answering(answer: Reply, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Give every request what ``answer`` makes of its method; yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    accepted, _ = listener.accept()
                except OSError:
                    return
                # A client that refuses our certificate, or goes, is what some tests are about.
                with contextlib.suppress(OSError), accepted:
                    wrapped = context.wrap_socket(accepted, server_side=True) if context else accepted
                    with contextlib.closing(wrapped), wrapped.makefile("rb") as stream:
                        method, length = stream.readline().split()[0].decode(), 0
                        while (line := stream.readline()) not in (b"\r\n", b""):
                            if line.lower().startswith(b"content-length:"):
                                length = int(line.partition(b":")[2])
                        stream.read(length)
                        wrapped.sendall(answer(method))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**S3_KEYS, **AZURE_KEYS}.items():
        monkeypatch.setenv(name, value)


def s3(port: int, scheme: str = "http", options: str = "") -> ObjectStore:
    return ObjectStore(parse_object_address(f"s3://bucket/p?endpoint={scheme}://127.0.0.1:{port}{options}"))


def azure(port: int) -> ObjectStore:
    return ObjectStore(parse_object_address(f"az://box/p?account=a&endpoint=http://127.0.0.1:{port}/a"))


@pytest.mark.parametrize(
    ("status", "code", "error", "match"),
    [
        (500, "InternalError", Unreachable, "500 InternalError"),
        (502, "", Unreachable, "502"),
        (503, "SlowDown", Unreachable, "503 SlowDown"),
        (504, "", Unreachable, "504"),
        (408, "RequestTimeout", Unreachable, "408"),
        (429, "TooManyRequests", Unreachable, "429"),
        (507, "", CapacityError, "507"),
        (403, "QuotaExceeded", CapacityError, "QuotaExceeded"),
        (400, "XMinioStorageFull", CapacityError, "XMinioStorageFull"),
        (401, "", ConfigError, "refuses the credentials.*401"),
        (403, "AccessDenied", ConfigError, "refuses the credentials.*AccessDenied"),
        (400, "ExpiredToken", ConfigError, "refuses the credentials.*ExpiredToken"),
        (403, "RequestTimeTooSkewed", ConfigError, "clock differs"),
        (301, "PermanentRedirect", ConfigError, "another region"),
        (400, "AuthorizationHeaderMalformed", ConfigError, "another region"),
        (404, "NoSuchBucket", ConfigError, "no such bucket"),
        (403, "InvalidObjectState", ConfigError, "in an archive"),
        (400, "InvalidRequest", Failed, "400 InvalidRequest"),
        (405, "MethodNotAllowed", Failed, "405"),
    ],
)
@pytest.mark.parametrize("call", ["get", "get_range", "put", "swap", "list"])
def test_a_refusal_is_the_error_that_its_reaction_needs(
    call: str, status: int, code: str, error: type[FarshoreError], match: str
) -> None:
    calls: dict[str, Callable[[ObjectStore], object]] = {
        "get": lambda store: store.get("x"),
        "get_range": lambda store: store.get_range("x", 0, 1),
        "put": lambda store: store.put_new("x", b"1"),
        "swap": lambda store: store.cas("x", b"1", '"etag"'),
        "list": lambda store: list(store.list("")),
    }
    with answering(lambda method: reply(status, code)) as port, pytest.raises(error, match=match) as raised:
        calls[call](s3(port))
    assert type(raised.value) is error
    assert "http" not in str(raised.value)


@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "OperationAborted", ""])
def test_a_create_that_another_request_hindered_is_undecided_unless_the_object_is_there(code: str) -> None:
    def absent(method: str) -> bytes:
        return reply(409, code) if method == "PUT" else reply(404)

    def present(method: str) -> bytes:
        return reply(409, code) if method == "PUT" else reply(200, headers=OBJECT)

    with answering(absent) as port, pytest.raises(Unreachable, match="under way"):
        s3(port).put_new("x", b"1")
    with answering(present) as port, pytest.raises(AlreadyExists):
        s3(port).put_new("x", b"1")


def test_a_swap_that_another_request_hindered_is_undecided() -> None:
    hindered = answering(lambda method: reply(409, "ConditionalRequestConflict"))
    with hindered as port, pytest.raises(Unreachable):
        s3(port).cas("x", b"1", '"etag"')


@pytest.mark.parametrize(("status", "code"), [(412, "PreconditionFailed"), (404, "NoSuchKey")])
def test_a_swap_of_what_has_changed_or_is_gone_is_refused(status: int, code: str) -> None:
    with answering(lambda method: reply(status, code)) as port, pytest.raises(Precondition):
        s3(port).cas("x", b"1", '"etag"')


@pytest.mark.parametrize("make", [s3, azure])
@pytest.mark.parametrize(
    ("answer", "answers_a_create"),
    [
        (reply(200, body=b"<html>Please log in</html>"), False),
        (b"HTTP/1.1 200 x\r\n", False),
        (b"SSH-2.0-OpenSSH_9.2\r\n", False),
        (b"", False),
        # Its head is whole and has an etag: of a create that is all there is to say.
        (b"HTTP/1.1 200 x\r\nConnection: close\r\n" + OBJECT + b"\r\nno length", True),
        (b"HTTP/1.1 200 x\r\nConnection: close\r\nContent-Length: 99\r\n" + OBJECT + b"\r\nshort", True),
    ],
)
def test_what_no_store_would_say_is_no_answer(
    make: Callable[[int], ObjectStore], answer: bytes, answers_a_create: bool
) -> None:
    with answering(lambda method: answer) as port:
        store = make(port)
        with pytest.raises(Unreachable):
            store.get("x")
        with pytest.raises((Unreachable, Failed)):
            store.get_range("x", 0, 5)
        if not answers_a_create:
            with pytest.raises(Unreachable):
                store.put_new("x", b"1")


def test_a_store_that_sends_all_where_a_part_was_asked_for_is_told_so() -> None:
    whole = answering(lambda method: reply(200, headers=OBJECT, body=b"0123456789"))
    with whole as port, pytest.raises(Failed, match="part of an object with all of it"):
        s3(port).get_range("x", 2, 3)


def test_a_missing_object_is_not_found() -> None:
    with answering(lambda method: reply(404, "NoSuchKey")) as port:
        for call in (s3(port).get, s3(port).size, s3(port).modified_s):
            with pytest.raises(NotFound):
                call("x")


def test_without_credentials_one_line_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in S3_KEYS:
        monkeypatch.delenv(name)
    with answering(lambda method: reply(404)) as metadata, answering(lambda method: reply(500)) as port:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{metadata}")
        with pytest.raises((ConfigError, Unreachable)) as raised:
            s3(port).get("x")
    assert str(raised.value).startswith("there are no credentials for the store: s3://bucket/p")
    assert "LoadCredential=" in str(raised.value)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


def test_a_store_of_an_unknown_authority_gets_no_request(context: ssl.SSLContext) -> None:
    asked: list[str] = []

    def answer(method: str) -> bytes:
        asked.append(method)
        return reply(200, headers=OBJECT)

    with answering(answer, context) as port, pytest.raises(ConfigError, match="certificate is not trusted"):
        s3(port, "https").get("x")
    assert asked == []


def test_a_private_authority_is_named_by_its_file(
    context: ssl.SSLContext, authority: trustme.CA, tmp_path: Path
) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with answering(lambda method: reply(200, headers=OBJECT, body=b"sealed"), context) as port:
        assert s3(port, "https", f"&ca={tmp_path}/ca.pem").get("x") == b"sealed"
