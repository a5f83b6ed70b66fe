"""Secure aggregation: the server sees the sum of the clients' updates and none of them.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (ACM CCS 2017; ePrint 2017/281), in
its semi-honest form, with the sparse neighbours of Bell et al. 2020 (ePrint 2020/704) where clients are many. docs/privacy.md
says what it protects from.

`settings` has the options, `chosen` what they cannot be combined with, `fixed` updates as integers, `primitives` the
cryptography, `party` a client's half and `gathering` the server's; a fleet calls `site` where clients train and `fleet` where
the round loop is.
"""
