"""The pocket model, its tokenizer and its processor, built from stock transformers classes: Idefics3 with a Llama text model.

Pictures of 64 × 64 pixels, patches of 8 pixels and a pixel shuffle of 2 give 16 image tokens per picture. The model has
about 2.9 million parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from fedmllm.rng import stream
from recipes.pocket import questions, scenes, texts
from recipes.pocket.words import KINDS, READABLE

PAD, BEGIN, END = "<pad>", "<begin>", "<end_of_utterance>"
IMAGE, AROUND, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
# The processor of this family needs these for pictures that it splits into tiles; it never splits 64 × 64 pictures.
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


def build_tokenizer(seed: int = 0, documents: int = 2000, vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it encodes any text, and the generated texts with about one token per word."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(corpus(seed, documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, bos_token=BEGIN, eos_token=END, padding_side="left", model_max_length=512
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Idefics3Processor:
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": scenes.SIZE},
        max_image_size={"longest_edge": scenes.SIZE},
        do_image_splitting=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return Idefics3Processor(pictures, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)


def build_config(tokenizer: PreTrainedTokenizerFast, **text: Any) -> Idefics3Config:
    """The config of the shipped model. `text` overrides entries of the text model's config (tests build smaller models)."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (("pad", PAD), ("bos", BEGIN), ("eos", END))}
    text_config = {
        "model_type": "llama",
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
        **{f"{name}_token_id": i for name, i in ids.items()},
        **text,
    }
    vision_config = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": scenes.SIZE,
        "patch_size": PATCH,
        "initializer_range": 0.08,
    }
    return Idefics3Config(
        text_config=text_config,
        vision_config=vision_config,
        scale_factor=SHUFFLE,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=True,
        dtype="float32",
        **{f"{name}_token_id": i for name, i in ids.items()},
    )


def build_model(config: Idefics3Config) -> Idefics3ForConditionalGeneration:
    model = Idefics3ForConditionalGeneration(config)
    for name in ("pad", "bos", "eos"):
        setattr(model.generation_config, f"{name}_token_id", getattr(config.text_config, f"{name}_token_id"))
    return model


def pixels(images: Iterable[Any]) -> np.ndarray:
    """(n, 3, SIZE, SIZE) float32 in [-1, 1]: the processor's output for pictures that already have the right size."""
    stacked = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return stacked.transpose(0, 3, 1, 2) / 127.5 - 1.0
