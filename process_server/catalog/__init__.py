"""The catalog: points as rows, for lists that would otherwise read every commit. A cache of the chains."""

from process_server.catalog.keeper import CatalogKeeper, open_catalog
from process_server.catalog.queries import Catalog, PointRow

__all__ = ["Catalog", "CatalogKeeper", "PointRow", "open_catalog"]
