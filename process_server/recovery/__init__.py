"""Recovery: which points there are, what a volume holds at one, and how it gets out of the vault."""
