"""Where the objects of a vault lie: one small interface, one module per kind of store."""

from process_server.vault.store.protocol import AlreadyExists, Body, Precondition, Store
from process_server.vault.store.url import open_store

__all__ = ["AlreadyExists", "Body", "Precondition", "Store", "open_store"]
