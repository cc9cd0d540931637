"""What runs on a protected server: capture, journal, replication, and the service around them."""
