"""The vault: sealed objects in one store, readable with a key and nothing else (docs/formats/vault.md)."""
