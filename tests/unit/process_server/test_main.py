"""The certificate of a running server: renewed when due, and handed on whatever the store does meanwhile."""

import asyncio
import ssl
from types import SimpleNamespace
from typing import cast

import pytest

from farshore import pki
from farshore.errors import FarshoreError, Unreachable
from process_server import main
from process_server.identity import Identity
from process_server.service import ProcessServer


class Renewing:
    """An identity whose certificate is due once, and a server; both meet a store that may not answer."""

    def __init__(self, *, lost_renewals: int = 0, lost_readings: int = 0) -> None:
        self.server = SimpleNamespace(certificate=b"new", key=b"key")
        self._lost_renewals, self._lost_readings = lost_renewals, lost_readings
        self._due = True
        self.handed_on = 0
        self.looked = asyncio.Event()

    async def renew_server(self) -> bool:
        if self.handed_on:
            self.looked.set()  # and went on after it
        if self._lost_renewals:
            self._lost_renewals -= 1
            raise Unreachable("no answer")
        due, self._due = self._due, False
        return due

    async def renew_tls(self) -> None:
        if self._lost_readings:
            self._lost_readings -= 1
            raise Unreachable("no answer")
        self.handed_on += 1


@pytest.mark.parametrize(("renewals", "readings"), [(0, 0), (2, 0), (0, 2), (1, 1)])
async def test_a_renewed_certificate_is_handed_on_though_the_store_did_not_answer(
    renewals: int, readings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "CERTIFICATE_CHECK_S", 0.001)
    used: list[bytes] = []
    monkeypatch.setattr(pki, "use_certificate", lambda context, certificate, key: used.append(certificate))
    fake = Renewing(lost_renewals=renewals, lost_readings=readings)
    keeping = asyncio.create_task(
        main._keep_certificate(
            cast(Identity, fake), cast(ProcessServer, fake), cast(ssl.SSLContext, SimpleNamespace())
        )
    )
    looked = asyncio.create_task(fake.looked.wait())
    await asyncio.wait({keeping, looked}, return_when=asyncio.FIRST_COMPLETED, timeout=30)
    keeping.cancel()
    looked.cancel()
    try:
        await keeping
    except asyncio.CancelledError:
        pass
    except FarshoreError as error:
        pytest.fail(f"it ended, and the server with it: {error}")
    assert fake.handed_on == 1
    assert used
    assert set(used) == {b"new"}
