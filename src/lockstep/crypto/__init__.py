"""Sector encryption and LUKS2 headers: what turns a disk into a mirror that only its owner can read."""
