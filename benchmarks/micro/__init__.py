"""Inner loops alone, with pytest-benchmark: `make bench-micro`. For before and after, not for quoting."""
