"""Capture as the agent uses it: talking to the tap, attaching devices. The tap itself is `agent.tap`."""
