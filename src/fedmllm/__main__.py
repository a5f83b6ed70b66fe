"""`python -m fedmllm` is the command line."""

from fedmllm.cli.app import app

if __name__ == "__main__":  # a sweep's processes import their parent's main module
    app()
