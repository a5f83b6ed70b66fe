"""What pocket models of all families share: the tokenizer, the chat template, and the sizes of pictures and text model.

Pictures of 64 × 64 pixels, patches of 8 pixels and the merging of 2 × 2 patches give 16 image tokens per picture. A family is
a subclass of `Family`, in a file of its own and in the table of `families.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fedmllm.rng import stream
from recipes.pocket import questions, scenes, texts
from recipes.pocket.words import KINDS, READABLE

PAD, BEGIN, END = "<pad>", "<begin>", "<end_of_utterance>"
IMAGE, AROUND, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
# The processor of Idefics3 needs these for pictures that it splits into tiles; it never splits 64 × 64 pictures.
TILES = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
SPECIAL = [PAD, BEGIN, END, IMAGE, AROUND, GLOBAL, *TILES]
PATCH, SHUFFLE = 8, 2
IMAGE_TOKENS = (scenes.SIZE // PATCH // SHUFFLE) ** 2

CHAT_TEMPLATE = (
    "{{ '<begin>' }}{% for message in messages %}"
    "{{ 'User:' if message['role'] == 'user' else 'Assistant:' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def corpus(seed: int, documents: int) -> Iterable[str]:
    """Texts for training the tokenizer: generated questions and answers, and the words of the benchmark's prompts."""
    for i in range(documents):
        rng = stream(seed, "tokenizer", i)
        shared, about_text = texts.ask_texts(rng, 3)
        pairs = questions.ask_scene(scenes.draw_scene(rng), rng, 4) + about_text
        yield f"{shared}\n" + " ".join(f"User: {question}\nAssistant: {answer}" for question, answer in pairs)
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    nouns = " ".join(" ".join(group) for group in KINDS.values()).split()
    words = [*texts.PROMPT_WORDS.split(), *READABLE, *nouns, *alphabet, *alphabet.upper(), *"0123456789"]
    # Each word occurs both inside a line and at the start of one; words of prompts are also capitalised.
    forms = " ".join(words + [word.capitalize() for word in texts.PROMPT_WORDS.split()])
    for _ in range(max(1, documents // 20)):
        yield forms + "\n" + forms.replace(" ", "\n")


def build_tokenizer(
    seed: int = 0, documents: int = 2000, vocabulary: int = 2048, special: Sequence[str] = SPECIAL
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it encodes any text, and the generated texts with about one token per word.

    `vocabulary` includes the control tokens of Idefics3. With others (`special`), it splits texts into the same tokens.
    """
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL) + len(special),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(corpus(seed, documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, bos_token=BEGIN, eos_token=END, padding_side="left", model_max_length=512
    )


def text_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The entries that the text model's config has in every family."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 160,
        "intermediate_size": 416,
        "num_hidden_layers": 6,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.06,  # near 1/√width; with 0.02, made for far wider models, learning starts late
        **token_ids(tokenizer),
    }


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The ids of the control tokens that a config names in every family."""
    pairs = (("pad", PAD), ("bos", BEGIN), ("eos", END))
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in pairs}


class Family(ABC):
    """What depends on the classes of transformers that a model consists of. Image tokens are in the order of `scenes.cells`."""

    name: str
    title: str
    """The classes, in words."""
    special: Sequence[str]
    """The control tokens, in the order of their ids."""
    image: str
    """The control token in whose place the model reads an image token."""
    mark: str
    """A picture, as the chat template writes it."""
    picture: str
    """A picture, as the processor writes it."""
    vision: tuple[str, ...]
    """Parts of the names of the parameters through which only pictures pass."""
    layers: tuple[str, ...]
    """Parts of the names of the layers whose matrices are trained with Muon."""
    model_class: type[Any]
    multiples: float = 0.0
    """The finished matrices are rounded to multiples of this, so that they compress well; 0: they are not."""

    @abstractmethod
    def build_config(self, tokenizer: PreTrainedTokenizerFast, **text: Any) -> Any:
        """The config. `text` overrides entries of the text model's config (tests build smaller models)."""

    @abstractmethod
    def build_processor(self, tokenizer: PreTrainedTokenizerFast) -> Any: ...

    @abstractmethod
    def image_tokens(self, model: Any, pixels: Tensor) -> Sequence[Tensor]:
        """(IMAGE_TOKENS, hidden) of each picture, as the model itself computes them. `pixels`: (pictures, 1, 3, SIZE, SIZE)."""

    def position_ids(self, ids: Tensor, positions: Tensor, image_token: int) -> Tensor:
        """What the model takes as position ids, for tokens at these places of their prompts; both (rows, length)."""
        return positions

    def build_model(self, config: Any) -> Any:
        model = self.model_class(config)
        for name in ("pad", "bos", "eos"):
            setattr(model.generation_config, f"{name}_token_id", getattr(config.text_config, f"{name}_token_id"))
        return model

    def chat_template(self) -> str:
        return CHAT_TEMPLATE.replace(repr(IMAGE), repr(self.mark))


def pixels(images: Iterable[Any]) -> np.ndarray:
    """(n, 3, SIZE, SIZE) float32 in [-1, 1]: the processor's output for pictures that already have the right size."""
    stacked = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return stacked.transpose(0, 3, 1, 2) / 127.5 - 1.0
