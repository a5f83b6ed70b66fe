"""Secure aggregation: the server sees the sum of the clients' updates, and no single update.

The protocol is the semi-honest form of Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine
Learning" (ACM CCS 2017; ePrint 2017/281), with the sparse neighbour graph of Bell et al. 2020 (ePrint 2020/704) for many
clients. docs/privacy.md says what it protects against.

`settings` defines the options, `fixed` encodes updates as integers, `primitives` wraps the cryptography, `client` and `clients`
are the client's half of the protocol, `secure_round` is the server's half, and `fleet` connects both to the round loop.
"""
