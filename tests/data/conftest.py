"""A real byte-level BPE tokenizer, trained in milliseconds on a few sentences."""

from __future__ import annotations

import pytest

CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "<|im_start|>user\nHow many apples are there?<|im_end|>\n<|im_start|>assistant\nThere are three apples.<|im_end|>",
    "Rust never sleeps, and neither do the compilers of this world; naïve cafés, however, do.",
] * 4

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer():
    """Factory: a fresh fast tokenizer with ChatML's tokens, with the chat template that is asked for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)

    def make(chat_template: str | None = None, **tokens: str | None):
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(core.to_str()),
            chat_template=chat_template,
            **({"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"} | tokens),
        )

    return make


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach the network fails the test."""
    import socket

    def refuse(*args, **kwargs):
        pytest.fail("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
