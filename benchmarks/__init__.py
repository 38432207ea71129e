"""Lockstep beside its peers: one fio, one machine, one run. See docs/benchmarks.md."""
