"""The Network Block Device protocol, server side.

`wire` holds the protocol's numbers and layouts, `negotiation` and `transmission` are its two phases without
any I/O, `server` is the transport that moves bytes between a socket, those two, and an `Export`.
"""
