"""A language model behind OpenAI's HTTP interface, which many servers and local programs offer."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request

from fedmllm.errors import RunError
from fedmllm.evaluation.judges import Judge, judges


@judges.register("openai")
def openai(
    *, endpoint: str, model: str, key_variable: str = "OPENAI_API_KEY", timeout_seconds: float = 30.0, retries: int = 2
) -> Judge:
    """Any server with OpenAI's chat completions, at `endpoint` + "/chat/completions"; the key is read from a variable."""
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"endpoint = {endpoint!r} must begin with http:// or https://")
    if not timeout_seconds > 0 or retries < 0:
        raise ValueError(f"timeout_seconds = {timeout_seconds} must be above 0 and retries = {retries} not negative")

    def ask(prompt: str) -> str:
        body = {"model": model, "temperature": 0, "max_tokens": 8, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(key_variable):
            headers["Authorization"] = f"Bearer {key}"
        url = endpoint.rstrip("/") + "/chat/completions"
        reason: object = None
        for _ in range(retries + 1):
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=timeout_seconds) as response:
                    return str(json.loads(response.read())["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                reason = error
                error.close()  # it holds the connection open
                if error.code < 500 and error.code != 429:  # the request itself is rejected, so a retry would not help
                    break
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                reason = error
        raise RunError(f"judge: {url} gave no usable answer ({type(reason).__name__}: {reason})")

    return ask
