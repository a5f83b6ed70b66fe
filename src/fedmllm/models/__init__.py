"""Multimodal language models: loading, adapters, cached vision features."""
