"""Tables of the catalog. No invariant rests on them: what is wrong here is read from the chain again."""

from typing import Final

from sqlalchemy import BigInteger, Column, LargeBinary, MetaData, PrimaryKeyConstraint, Table, Text

METADATA: Final = MetaData()

CHAINS: Final = Table(
    "chains",
    METADATA,
    Column("machine", LargeBinary, primary_key=True),  # machine id, 16 bytes
    Column("seq", BigInteger, nullable=False),  # every commit up to it is in the other tables
    Column("digest", LargeBinary, nullable=False),  # of that commit; another one there means: read anew
)

POINTS: Final = Table(
    "points",
    METADATA,
    Column("machine", LargeBinary, nullable=False),
    Column("seq", BigInteger, nullable=False),  # of the commit, which is the point
    Column("time_ns", BigInteger, nullable=False),  # server's clock when the cut's MARK arrived
    Column("consistency", Text, nullable=False),
    Column("tag", Text),  # null: nobody asked for this point
    Column("timeline", LargeBinary, nullable=False),
    PrimaryKeyConstraint("machine", "seq"),
)

POINT_VOLUMES: Final = Table(
    "point_volumes",
    METADATA,
    Column("machine", LargeBinary, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("name", Text, nullable=False),
    Column("lsn", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    PrimaryKeyConstraint("machine", "seq", "name"),
)
