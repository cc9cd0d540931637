"""A vault in a bucket: S3 and what speaks like it, and Azure Blob Storage, through obstore.

One request a call, and never again by itself: obstore's own retry would meet an object that its first try
made and call it somebody else's. Who tries again is `RetryingStore`, which knows what it has sent before.
The synchronous interface: with the asynchronous one a process that ends may abort (measured: 20 of 120).
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Final, NoReturn

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import AzureStore, S3Store

from farshore.errors import ConfigError, NotFound, Unreachable
from farshore.units import MIB
from process_server.vault.store.address import ObjectAddress, read_ca
from process_server.vault.store.answers import Answer, error_of
from process_server.vault.store.credentials import azure_credentials, s3_credentials
from process_server.vault.store.protocol import (
    AlreadyExists,
    Body,
    Precondition,
    body_bytes,
    check_name,
    is_name,
)

if TYPE_CHECKING:
    from obstore import PutMode
    from obstore.store import AzureConfig, ClientConfig, RetryConfig, S3Config

CONNECT_S: Final = 10.0
SILENT_S: Final = 30.0
"""How long an answer, or the next bytes of one, may take; and a request of up to `SMALL_BYTES` to be sent."""
SMALL_BYTES: Final = MIB
REQUEST_S: Final = 300.0
"""How long any request may take in all: 64 MiB at 1.8 Mbit/s."""
LIST_AT_ONCE: Final = 1000

_ONCE: Final["RetryConfig"] = {"max_retries": 0, "retry_timeout": timedelta(0)}
_RANGE_END_MAX: Final = 2**63 - 1


class ObjectStore:
    """Objects below one prefix of a bucket or container (docs/formats/vault.md, "Object stores").

    A create or swap that raises Unreachable may have happened, or happen yet. Nothing is asked of the store
    before the first call. Several threads may use it; `farshore.errors.ConfigError` is raised, besides what
    `Store` says, when the store refuses the credentials or has no such bucket.

    Raises:
        ConfigError: The credentials or the CA that the address names cannot be read.
    """

    def __init__(self, address: ObjectAddress) -> None:
        self._where = str(address)
        # Told apart by size: the time without an answer counts while a body is sent, too, and a large one
        # over a slow line is no dead peer.
        self._quick = _open(address, silent=True)
        self._bulk = _open(address, silent=False)

    def put_new(self, name: str, body: Body) -> None:
        self._put(name, body, "create", "cannot create the object")

    def get(self, name: str) -> bytes:
        return self.get_with_etag(name)[0]

    def get_with_etag(self, name: str) -> tuple[bytes, str]:
        check_name(name)
        try:
            found = obstore.get(self._quick, name)
            body = bytes(found.bytes())
        except (BaseError, OSError) as exc:
            self._raise("cannot read the object", name, exc)
        # Of both kinds every object has an etag: without one it is a proxy or portal that answered.
        etag = found.meta["e_tag"]
        if len(body) != found.meta["size"] or etag is None:
            raise self._not_whole(name)
        return body, etag

    def get_range(self, name: str, at: int, length: int) -> bytes:
        if at < 0 or length < 0:
            raise ValueError(f"no range: {length} bytes at {at}")
        check_name(name)
        if length == 0 or at > _RANGE_END_MAX:
            self.size(name)  # no request can ask for nothing; but it may say that there is no such object
            return b""
        end = min(at + length, _RANGE_END_MAX)
        try:
            found = obstore.get(self._quick, name, options={"range": (at, end)})
            body = bytes(found.bytes())
        except (BaseError, OSError) as exc:
            if Answer.of(exc).is_past_the_end:
                return b""
            self._raise("cannot read the object", name, exc)
        if len(body) != min(end, found.meta["size"]) - at:
            raise self._not_whole(name)
        return body

    def size(self, name: str) -> int:
        return self._head(name)[0]

    def modified_s(self, name: str) -> float:
        return self._head(name)[1]

    def list(self, prefix: str) -> Iterator[str]:
        # The store is asked for a folder: that is the only prefix that obstore knows.
        folder = prefix.rpartition("/")[0]
        if folder and not is_name(folder):
            return
        try:
            for page in obstore.list(self._quick, prefix=folder or None, chunk_size=LIST_AT_ONCE):
                for found in page:
                    if found["path"].startswith(prefix) and is_name(found["path"]):
                        yield found["path"]
        except (BaseError, OSError) as exc:
            self._raise("cannot list the objects", prefix, exc)

    def cas(self, name: str, body: Body, expected: str | None) -> str:
        mode: PutMode = "create" if expected is None else {"e_tag": expected}
        try:
            return self._put(name, body, mode, "cannot replace the object")
        except (AlreadyExists, NotFound):
            raise Precondition("cannot replace the object", where=name, why="it has changed") from None

    def delete(self, name: str) -> None:
        check_name(name)
        try:
            obstore.delete(self._quick, name)
        except FileNotFoundError:
            pass
        except (BaseError, OSError) as exc:
            self._raise("cannot delete the object", name, exc)

    def close(self) -> None:
        """Connections go when the store is forgotten."""

    def _put(self, name: str, body: Body, mode: "PutMode", what: str) -> str:
        check_name(name)
        # A copy of our own: after a time-out the library may hold the bytes on a connection that it has yet
        # to close, and the caller uses that memory again.
        content = body_bytes(body)
        client = self._quick if len(content) <= SMALL_BYTES else self._bulk
        try:
            put = obstore.put(client, name, content, mode=mode, use_multipart=False)
        except AlreadyExistsError as exc:
            # S3 says 409 also when another request for this name was under way, whatever became of that.
            if Answer.of(exc).is_undecided and not self._exists(name):
                raise Unreachable(what, where=name, why="another request for it was under way") from None
            raise AlreadyExists(what, where=name, why="it exists") from None
        except PreconditionError as exc:
            # Also when the object, or the whole bucket, is gone.
            if Answer.of(exc).is_no_bucket:
                self._raise(what, name, exc)
            raise Precondition(what, where=name, why="it has changed") from None
        except (BaseError, OSError) as exc:
            if mode == "create" and isinstance(exc, FileNotFoundError):
                raise ConfigError(
                    "there is no such bucket", where=self._where, fix="make it first, or check the address"
                ) from None
            self._raise(what, name, exc)
        etag = put["e_tag"]
        if etag is None:
            raise Unreachable(what, where=name, why="the answer has no etag: it is not the store's")
        return etag

    def _exists(self, name: str) -> bool:
        try:
            self._head(name)
        except NotFound:
            return False
        return True

    def _head(self, name: str) -> tuple[int, float]:
        check_name(name)
        try:
            found = obstore.head(self._quick, name)
        except (BaseError, OSError) as exc:
            self._raise("cannot look at the object", name, exc)
        if found["e_tag"] is None:
            raise self._not_whole(name)
        return found["size"], found["last_modified"].timestamp()

    def _not_whole(self, name: str) -> Unreachable:
        return Unreachable(
            "cannot read the object", where=name, why="the answer is cut short, or not the store's"
        )

    def _raise(self, what: str, name: str, exc: BaseException) -> NoReturn:
        # "from None": the library's text holds the request's address, which may be signed with a secret.
        raise error_of(Answer.of(exc), what, name, self._where) from None


def _open(address: ObjectAddress, *, silent: bool) -> S3Store | AzureStore:
    client: ClientConfig = {
        "allow_http": address.is_plain_http,
        "allow_invalid_certificates": False,  # the library would take it from the environment
        "connect_timeout": timedelta(seconds=CONNECT_S),
        "timeout": timedelta(seconds=REQUEST_S),
        "user_agent": "farshore",
    }
    if silent:
        client["read_timeout"] = timedelta(seconds=SILENT_S)
    if (ca := read_ca(address)) is not None:
        client["root_certificate"] = ca
    try:
        return _open_s3(address, client) if address.scheme == "s3" else _open_azure(address, client)
    except (BaseError, ValueError) as exc:
        why = (
            str(exc).partition("\n")[0]
            if not isinstance(exc, BaseError)
            else "its client refuses the settings"
        )
        raise ConfigError("cannot open the vault", where=str(address), why=why) from None


def _open_s3(address: ObjectAddress, client: "ClientConfig") -> S3Store:
    # What is not said here the library takes from the environment; what could move the vault, or make a
    # request weaker, is said.
    config: S3Config = {
        "conditional_put": "etag",
        "virtual_hosted_style_request": False,
        "unsigned_payload": False,
        # One object a request: the other way is not in every store that speaks S3.
        "disable_bulk_delete": True,
    }
    if address.region:
        config["region"] = address.region
    if address.endpoint:
        config["endpoint"] = config["aws_endpoint_url_s3"] = address.endpoint
    return S3Store(
        address.bucket,
        prefix=address.prefix or None,
        config=config,
        client_options=client,
        retry_config=_ONCE,
        credential_provider=s3_credentials(),
    )


def _open_azure(address: ObjectAddress, client: "ClientConfig") -> AzureStore:
    config: AzureConfig = {"use_emulator": False, "use_fabric_endpoint": False}  # as above
    if address.account:
        config["account_name"] = address.account
    if address.endpoint:
        config["endpoint"] = address.endpoint
    return AzureStore(
        address.bucket,
        prefix=address.prefix or None,
        config=config,
        client_options=client,
        retry_config=_ONCE,
        credential_provider=azure_credentials(),
    )
