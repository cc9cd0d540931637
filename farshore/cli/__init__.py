"""The command line: one module per noun, and the only place where an error becomes an exit code."""
