"""Byte-level BPE with chat tokens, trained by the library `tokenizers`, kept as a transformers tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML. The generation block marks what the assistant says, its end-of-turn token included, so that the
loss falls on those tokens only (transformers' ``return_assistant_tokens_mask``)."""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train on ``texts``; digits are single tokens.

    The padding token is end-of-text and the end-of-sequence token is end-of-turn: they differ, so that masking
    the padding never hides the token that teaches the model to stop.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def end_of_text_id(tokenizer: Any) -> int:
    """The token that separates documents in pretraining.

    ``<|endoftext|>`` where the vocabulary has it (ours, GPT-2, Qwen, SmolLM); the end-of-sequence token elsewhere.
    """
    token_id = tokenizer.get_vocab().get(END_OF_TEXT)
    return int(tokenizer.eos_token_id if token_id is None else token_id)


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Tokens that end a response: end-of-turn and end-of-text."""
    return sorted({int(tokenizer.eos_token_id), end_of_text_id(tokenizer)})
