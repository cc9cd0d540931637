"""What operators have agents do: COMMAND out, RESULT in."""

import asyncio
import itertools

from farshore.errors import Conflict, Failed, Unreachable
from farshore.wire import messages as m
from process_server.ingest.machine import Machine
from process_server.ingest.session import Session


class Commands:
    """Commands that were sent and not answered."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[Session, asyncio.Future[m.Result]]] = {}
        self._requests = itertools.count(1)

    def answered(self, session: Session, result: m.Result) -> None:
        """An agent answered; what nobody waits for any more, or another session was asked, is dropped."""
        owner, future = self._waiting.get(result.id, (None, None))
        if owner is session and future is not None and not future.done():
            future.set_result(result)

    def session_ended(self, session: Session) -> None:
        """Nobody will answer what ``session`` was asked."""
        for owner, future in self._waiting.values():
            if owner is session and not future.done():
                future.set_result(m.Result(0, False, "the session ended"))

    async def create_point(
        self, machine: Machine, tag: str, timeout_s: float, *, allow_fuzzy: bool = False
    ) -> str:
        """Have the agent cut a point that carries ``tag``; return its id once it is vaulted.

        Args:
            allow_fuzzy: A fuzzy point will do, as always where a disk in use is scanned.

        Raises:
            Unreachable: The agent is not connected.
            Failed: Not vaulted in time; it may still be later.
            Conflict: The agent cannot make one now; or it is made and fuzzy, and that was not allowed.
        """
        session = _connected(machine)
        try:
            async with asyncio.timeout(timeout_s):
                result = await self._ask(session, "point", None, tag)
                if not result.ok:
                    raise Conflict("the agent cannot make a point now", where=machine.name, why=result.text)
                async with machine.changed:
                    await machine.changed.wait_for(
                        lambda: (session.id, result.cut_seq) in machine.outcomes or bool(session.ended)
                    )
                outcome = machine.outcomes.get((session.id, result.cut_seq))
        except TimeoutError:
            raise Failed(
                "the point was not vaulted in time", where=machine.name, why=f"{timeout_s:g} s"
            ) from None
        if outcome is None:
            raise Failed("the point was not vaulted", where=machine.name, why=session.ended)
        if outcome.consistency == "fuzzy" and not allow_fuzzy:
            raise Conflict(
                "the point is fuzzy",
                where=outcome.point,
                why="the machine is not fully protected at the moment, or a disk in use is scanned",
                fix="wait until `farshore status` shows it protected, or be content with --allow-fuzzy;"
                " of this point, recover takes any volume that is not fuzzy with --volume,"
                " all with --allow-fuzzy",
            )
        return outcome.point

    async def _ask(self, session: Session, verb: str, volume: str | None, tag: str | None) -> m.Result:
        request = next(self._requests)
        future: asyncio.Future[m.Result] = asyncio.get_running_loop().create_future()
        self._waiting[request] = session, future
        session.link.send(m.Command(request, verb, volume, tag))
        try:
            return await future
        finally:
            del self._waiting[request]


def _connected(machine: Machine) -> Session:
    session = machine.session
    if session is None or session.ended:
        raise Unreachable("the agent is not connected", where=machine.name)
    return session
