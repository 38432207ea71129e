"""The handshake parser, fed by a coverage-guided fuzzer. Usage: see README.md."""

import sys

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

with atheris.instrument_imports(include=["lockstep.nbd"]):
    from fuzz.bodies import negotiate

if __name__ == "__main__":
    atheris.Setup(sys.argv, negotiate)
    atheris.Fuzz()
