"""PaliGemma has no chat format: picture, begin-of-text token, prompt and line break form a prefix (2407.07726).

The tokens of the prefix attend to each other in both directions; the answer is causal.
"""

from __future__ import annotations

from fedmllm.models.families import Family, families


@families.register("paligemma")
def paligemma() -> Family:
    """PaliGemma 1 and 2.

    The processor adds the begin-of-text token and the line break, but accepts no prompt without a picture.
    """
    return Family(
        first_position=1,
        answer_type=1,
        template=(
            "{% for message in messages %}{% for part in message['content'] %}"
            "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
            "{% endfor %}{% endfor %}"
        ),
        text_prompt="{begin}{prompt}\n",
    )
