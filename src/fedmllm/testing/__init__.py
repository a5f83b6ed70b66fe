"""Contract checks for parts of your own: plain functions that raise AssertionError, for use in any test framework.

    from fedmllm.testing import check_algorithm

    def test_trimmed_mean() -> None:
        check_algorithm("trimmed-mean", share=0.2)

The file that registers the part must be imported first: by the test, through an entry point, or with `registry.load_plugin`.
"""

from fedmllm.algorithms.toy_federation import ToyFleet, lora_adapter, round_info, run_rounds, train_round
from fedmllm.testing.algorithms import check_algorithm, check_compression, check_regularization, check_robust
from fedmllm.testing.data import check_partition, check_prompt, check_scenario, check_task
from fedmllm.testing.families import check_family
from fedmllm.testing.suites import check_suite, toy_exam

__all__ = [
    "ToyFleet", "check_algorithm", "check_compression", "check_family", "check_partition", "check_prompt",
    "check_regularization", "check_robust", "check_scenario", "check_suite", "check_task", "lora_adapter", "round_info",
    "run_rounds", "toy_exam", "train_round",
]  # fmt: skip
