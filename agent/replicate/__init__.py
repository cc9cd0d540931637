"""The sender: journals become the stream, copiers fill the vault, cuts tie the two together."""
