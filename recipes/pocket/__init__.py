"""The recipe for the pocket model, the small multimodal model that ships with fedmllm. `pretrain` describes its stages."""
