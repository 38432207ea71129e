"""The one thing pyproject.toml cannot say yet: the native kernel, which may fail to build.

Without a compiler or the OpenSSL headers the package installs all the same and encrypts
through the `cryptography` package, more slowly; `lockstep --version` says which is in use.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "lockstep.crypto._xts",
            ["src/lockstep/crypto/_xts.pyx"],
            libraries=["crypto"],
            extra_compile_args=["-O2", "-Wall"],
            optional=True,
        )
    ]
)
