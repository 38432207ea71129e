"""A whole connection over a disk in memory, fed by a coverage-guided fuzzer. Usage: see README.md."""

import sys

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

with atheris.instrument_imports(include=["lockstep.nbd"]):
    from fuzz.bodies import connect

if __name__ == "__main__":
    atheris.Setup(sys.argv, connect)
    atheris.Fuzz()
