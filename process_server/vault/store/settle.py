"""A create whose outcome is unknown, settled by reading back: for objects that only we can have written."""

from process_server.vault.store.protocol import AlreadyExists, Body, Store, body_bytes, buffers_of


def put_same(store: Store, name: str, body: Body) -> None:
    """Create ``name``, or find there exactly these bytes: for packs and maps, whose names nobody else draws.

    May be called again with the same body after Unreachable, as often as needed.

    Raises:
        AlreadyExists: Other bytes lie there.
        Unreachable: The outcome is unknown still.
    """
    try:
        store.put_new(name, body)
    except AlreadyExists:
        length = sum(len(piece) for piece in buffers_of(body))
        if store.size(name) != length or store.get(name) != body_bytes(body):
            raise
