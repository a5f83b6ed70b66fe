"""The round loop, the plan that it follows, and the records that it makes."""

from fedmllm.federation.plan import (
    FederationPlan,
    Fleet,
    RoundRecord,
    TooFewUpdates,
    learning_rate,
    participants,
    sample_clients,
    sum_groups,
)
from fedmllm.federation.rounds import each_alone, federate

__all__ = [
    "FederationPlan", "Fleet", "RoundRecord", "TooFewUpdates", "each_alone", "federate", "learning_rate", "participants",
    "sample_clients", "sum_groups",
]  # fmt: skip
