"""What the agent and the process server share: values, codecs, errors, telemetry, command line."""

__version__ = "0.1.0"
