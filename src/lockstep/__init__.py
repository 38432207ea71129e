"""A continuously encrypted mirror for disks."""

__version__ = "0.1.0"
