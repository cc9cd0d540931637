"""How the agent starts its other processes."""

import os
import sys


def environment() -> dict[str, str]:
    """Return an environment in which ``python -m agent.…`` finds the same code as this process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
