"""The recipe that produced the pocket model, the small multimodal model that ships with fedmllm."""
