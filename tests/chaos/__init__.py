"""Every way a connection can break, at every moment: what the task did, and what the server saw."""
