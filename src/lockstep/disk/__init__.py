"""Where bytes live: the plain target, the encrypted mirror, and what a path is before it becomes either."""
