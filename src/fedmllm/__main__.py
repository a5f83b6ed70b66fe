"""`python -m fedmllm` is the command line."""

from fedmllm.cli import app

app()
