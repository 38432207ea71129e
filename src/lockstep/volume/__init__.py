"""One target with its mirrors: the write path, what is in flight, what differs, and how it is made equal."""
