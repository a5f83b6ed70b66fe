"""fedmllm: federated fine-tuning of multimodal language models whose clients hold different modalities."""

__version__ = "0.1.0"
