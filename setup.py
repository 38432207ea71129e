"""The one thing pyproject.toml cannot say yet: the native inner loops, which may fail to build.

Without a compiler or the headers of libgcrypt the package installs all the same, encrypts through the `cryptography`
package and serves writes one by one, more slowly; `lockstep --version` says what encrypts.
"""

from setuptools import Extension, setup

NATIVE = {
    "lockstep._work": [],
    "lockstep.crypto._xts": ["gcrypt"],
    "lockstep.disk._runs": [],
    "lockstep.nbd._frames": [],
}

setup(
    ext_modules=[
        Extension(
            name,
            [f"src/{name.replace('.', '/')}.pyx"],
            libraries=libraries,
            extra_compile_args=["-O2", "-Wall"],
            optional=True,
        )
        for name, libraries in NATIVE.items()
    ]
)
