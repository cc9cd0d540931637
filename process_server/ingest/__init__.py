"""From an agent's connection to a commit: sessions, the pipeline of the worker processes, commit assembly."""
