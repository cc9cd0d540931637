"""The control plane: what operators ask of a process server, over HTTPS."""
