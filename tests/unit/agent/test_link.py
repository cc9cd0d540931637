"""Reasons, backing off, and who the server must be."""

import random
import ssl
from pathlib import Path

import pytest

from agent.link import REASONS, Backoff, LinkDown, Server, check_server, explain, refusal
from farshore.wire import frames
from farshore.wire import messages as m

SERVER = Server("gateway", 9443, bytes(range(16)), Path())


def test_the_wait_is_jittered_in_full_and_bounded() -> None:
    backoff = Backoff(random.Random(1))
    waits = [backoff.next_s() for _ in range(200)]
    assert all(0 <= wait <= min(30, 0.5 * 2**n) for n, wait in enumerate(waits))
    assert max(waits) > 25
    assert min(waits[10:]) < 5
    backoff.reset()
    assert backoff.next_s() <= 0.5


def test_only_the_server_of_our_vault_will_do() -> None:
    name = "farshore:" + bytes(range(16)).hex()
    check_server({"subjectAltName": (("URI", name),)}, "hrl/1", SERVER)
    for certificate in (
        None,
        {"subjectAltName": (("DNS", name),)},
        {"subjectAltName": (("URI", name + ":machine:" + name[9:]),)},
        {"subjectAltName": (("URI", "farshore:" + "0" * 32),)},
    ):
        with pytest.raises(LinkDown) as caught:
            check_server(certificate, "hrl/1", SERVER)
        assert caught.value.reason == "certificate"
    with pytest.raises(LinkDown, match="hrl/1"):
        check_server({"subjectAltName": (("URI", name),)}, None, SERVER)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "unreachable"),
        (OSError(113, "No route to host"), "unreachable"),
        (ConnectionResetError(104, "reset"), "closed"),
        (EOFError(), "closed"),
        (TimeoutError(), "timeout"),
        (ssl.SSLCertVerificationError(1, "bad"), "certificate"),
        (frames.ProtocolError("not a frame"), "protocol"),
        (ValueError("x"), "internal"),
    ],
)
def test_every_fault_has_a_reason_and_one_line(error: Exception, reason: str) -> None:
    if isinstance(error, ssl.SSLCertVerificationError):
        error.verify_message = "self-signed certificate"
    down = explain(error, SERVER.address)
    assert down.reason == reason
    assert "\n" not in str(down)
    assert down.retryable


def test_a_refused_client_certificate_is_called_that() -> None:
    error = ssl.SSLError(1, "alert")
    error.reason = "SSLV3_ALERT_CERTIFICATE_EXPIRED"
    down = explain(error, SERVER.address)
    assert (down.reason, "expired" in str(down)) == ("refused", True)


@pytest.mark.parametrize("code", ["denied", "superseded", "auth", "gap", "retry", "no-such-code"])
def test_the_servers_words_are_passed_on(code: str) -> None:
    down = refusal(m.Error(code, "because"), SERVER.address)
    assert down.reason in REASONS
    assert "because" in str(down)
