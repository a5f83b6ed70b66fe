"""Robust aggregation: estimates of the mean update that a minority of bad clients cannot move far, one file a family.

Each docstring has the source, the breakdown point (the largest share of bad updates under which the estimate stays within a
bound that does not depend on them) and the cost for n updates of d numbers; the plain mean costs n d.
"""
