"""The link: one framed, multiplexed, resumable session on any duplex byte stream.

``frames`` is the wire format, ``wire`` the byte streams, ``handshake`` who may speak, ``session``
what both ends share, ``client`` and ``server`` its two ends, ``relay`` a program that carries
stdio to the agent's socket.  The modules are imported one by one: the relay must start quickly.
"""
