"""The gateway: takes in what agents send, keeps the vault, and brings machines back from it."""
