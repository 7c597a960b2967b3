from __future__ import annotations

import numpy as np
import pytest

from smartinit.data.columns import Columns
from smartinit.data.tokenise import Tokeniser
from smartinit.errors import DataError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Only the last turn keeps an (empty) block of thoughts, as in hybrid reasoning models.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The generation prompt opens a tag which finished turns do not have.
OPENED = CHATML.replace("assistant\n", "assistant\n<think>")
# Every rendering starts with its number of messages: nothing is a prefix of anything.
COUNTED = "{{ messages | length }}" + CHATML

TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "There are three apples."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Two naïve apples."},
]


def tokenise(tokenizer, columns, rows, **options):
    """Tokenise a list of rows; missing keys become None, as in a column of a dataset."""
    names = {name for row in rows for name in row}
    table = {name: [row.get(name) for row in rows] for name in names}
    settings = {"max_length": 1000} | options
    return Tokeniser(tokenizer, columns, **settings)(table, list(range(1, len(rows) + 1)))


def counted(tokenizer, row):
    """The text of the tokens that count."""
    return tokenizer.decode(row.input_ids[row.labels != -100])


TEXT = Columns("text", ("text",))
PAIR = Columns("pair", ("prompt",), "completion")
MESSAGES = Columns("messages", ("messages",))


def test_text_ends_with_the_end_token_and_all_tokens_count(make_tokenizer):
    tokenizer = make_tokenizer()
    (row,) = tokenise(tokenizer, TEXT, [{"text": "The capital of France is Paris."}])
    assert tokenizer.decode(row.input_ids) == "The capital of France is Paris.<eos>"
    assert np.array_equal(row.labels, row.input_ids)


def test_text_is_not_ended_twice(make_tokenizer):
    tokenizer = make_tokenizer()
    (row,) = tokenise(tokenizer, TEXT, [{"text": "Paris.<eos>"}])
    assert tokenizer.decode(row.input_ids) == "Paris.<eos>"


def test_a_completion_is_not_ended_twice(make_tokenizer):
    tokenizer = make_tokenizer()
    (row,) = tokenise(tokenizer, PAIR, [{"prompt": "Where? ", "completion": "Paris.<eos>"}])
    assert tokenizer.decode(row.input_ids) == "Where? Paris.<eos>"


def test_text_with_a_begin_token(make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    bos = ("<bos>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    text, pair = (
        tokenise(tokenizer, columns, [{"text": "Paris.", "prompt": "Where? ", "completion": "Paris."}])[0]
        for columns in (TEXT, PAIR)
    )
    assert tokenizer.decode(text.input_ids) == "<bos>Paris.<eos>"
    assert tokenizer.decode(pair.input_ids) == "<bos>Where? Paris.<eos>"
    assert counted(tokenizer, pair).strip() == "Paris.<eos>"


@pytest.mark.parametrize("empty", ["", None, "  \n"])
def test_empty_rows_do_not_count(make_tokenizer, empty):
    tokenizer = make_tokenizer()
    rows = tokenise(tokenizer, TEXT, [{"text": empty}, {"text": "Paris"}])
    assert [row.counts for row in rows] == [False, True]
    rows = tokenise(
        tokenizer, PAIR, [{"prompt": "Paris", "completion": empty}, {"prompt": empty, "completion": "Paris"}]
    )
    assert [row.counts for row in rows] == [False, True]
    segments = tokenise(tokenizer, TEXT, [{"text": empty}, {"text": "Paris"}], causal=False)
    assert [row.counts for row in segments] == [False, True]


def test_prompt_tokens_do_not_count(make_tokenizer):
    tokenizer = make_tokenizer()
    (row,) = tokenise(tokenizer, PAIR, [{"prompt": "What is the capital of France?", "completion": " Paris."}])
    assert tokenizer.decode(row.input_ids) == "What is the capital of France? Paris.<eos>"
    assert counted(tokenizer, row) == " Paris.<eos>"


def test_a_token_across_the_boundary_counts(make_tokenizer):
    tokenizer = make_tokenizer()
    word = max((token for token in tokenizer.get_vocab() if token.isascii() and token.isalpha()), key=len)
    prompt, completion = word[:2], word[2:]
    (row,) = tokenise(tokenizer, PAIR, [{"prompt": prompt, "completion": completion}])
    assert len(row) == 2, "the word should be one token for this test"
    assert counted(tokenizer, row) == f"{word}<eos>"


def test_question_and_answer_get_a_line_break(make_tokenizer):
    tokenizer = make_tokenizer()
    columns = Columns("pair", ("instruction", "input"), "output", "\n")
    rows = [{"instruction": "Add.", "input": "", "output": "3"}, {"instruction": "Add.", "input": "1 2", "output": "3"}]
    first, second = tokenise(tokenizer, columns, rows)
    assert tokenizer.decode(first.input_ids) == "Add.\n3<eos>"
    assert tokenizer.decode(second.input_ids) == "Add.\n1 2\n3<eos>"
    assert counted(tokenizer, second) == "3<eos>"


def test_without_masking_everything_counts(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    rows = [
        *tokenise(tokenizer, PAIR, [{"prompt": "What? ", "completion": "Paris."}], mask_prompt=False),
        *tokenise(tokenizer, MESSAGES, [{"messages": TALK}], mask_prompt=False),
        *tokenise(tokenizer, PAIR, [{"prompt": TALK[:2], "completion": TALK[2:3]}], mask_prompt=False),
    ]
    for row in rows:
        assert np.array_equal(row.labels, row.input_ids)


def test_long_rows_are_cut_on_the_right(make_tokenizer):
    tokenizer = make_tokenizer()
    long, all_prompt = tokenise(
        tokenizer,
        PAIR,
        [{"prompt": "a", "completion": "b" * 50}, {"prompt": "a" * 50, "completion": "b"}],
        max_length=8,
    )
    assert len(long) == len(all_prompt) == 8
    assert long.counts
    assert not all_prompt.counts
    assert long.input_ids.base is None, "a view would keep the long row in memory"
    (segment,) = tokenise(tokenizer, TEXT, [{"text": "b" * 50}], max_length=8, causal=False)
    assert len(segment) == 8


class TestMessages:
    @pytest.mark.parametrize("template", [CHATML, MARKED])
    def test_only_the_assistant_counts(self, make_tokenizer, template):
        tokenizer = make_tokenizer(template)
        (row,) = tokenise(tokenizer, MESSAGES, [{"messages": TALK}])
        assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(TALK, tokenize=False)
        assert counted(tokenizer, row) == "There are three apples.<|im_end|>\nTwo naïve apples.<|im_end|>\n"

    def test_marks_of_the_template_outrank_what_follows_from_prefixes(self, make_tokenizer):
        """Here they leave out the end of the turn; the line break before it is in no token's offsets."""
        narrow = MARKED.replace(
            "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}",
            "{% generation %}{{ message['content'] + '\n' }}{% endgeneration %}{{ '<|im_end|>' }}",
        )
        tokenizer = make_tokenizer(narrow)
        (row,) = tokenise(tokenizer, MESSAGES, [{"messages": TALK}])
        assert counted(tokenizer, row) == "There are three apples.\nTwo naïve apples.\n"

    def test_marked_and_unmarked_templates_agree(self, make_tokenizer):
        marked, unmarked = (
            tokenise(make_tokenizer(template), MESSAGES, [{"messages": TALK}])[0] for template in (MARKED, CHATML)
        )
        assert np.array_equal(marked.labels, unmarked.labels)

    def test_thoughts_that_only_the_last_turn_has(self, make_tokenizer):
        tokenizer = make_tokenizer(THINKING)
        (row,) = tokenise(tokenizer, MESSAGES, [{"messages": TALK}])
        assert counted(tokenizer, row) == "There are three apples.<think>\n\n</think>\n\nTwo naïve apples.<|im_end|>\n"

    def test_a_generation_prompt_that_finished_turns_lack(self, make_tokenizer):
        tokenizer = make_tokenizer(OPENED)
        (row,) = tokenise(tokenizer, MESSAGES, [{"messages": TALK[1:3]}])
        assert counted(tokenizer, row) == "<|im_start|>assistant\nThere are three apples.<|im_end|>\n"

    def test_a_template_that_hides_the_turns_is_refused(self, make_tokenizer):
        with pytest.raises(DataError, match=r"assistant's tokens of row 1 of the data cannot.*--no-label-mask"):
            tokenise(make_tokenizer(COUNTED), MESSAGES, [{"messages": TALK}])
        (row,) = tokenise(make_tokenizer(COUNTED), MESSAGES, [{"messages": TALK}], mask_prompt=False)
        assert row.counts

    def test_no_turn_of_the_assistant_or_no_message_at_all(self, make_tokenizer):
        rows = tokenise(make_tokenizer(CHATML), MESSAGES, [{"messages": TALK[:2]}, {"messages": []}])
        assert not any(row.counts for row in rows)

    def test_sharegpt_names_and_keys_filled_with_none(self, make_tokenizer):
        tokenizer = make_tokenizer(CHATML)
        talk = [
            {"from": "human", "value": "How many?", "weight": None},
            {"from": "gpt", "value": "Three.", "weight": None},
        ]
        (row,) = tokenise(tokenizer, Columns("messages", ("conversations",)), [{"conversations": talk}])
        assert counted(tokenizer, row) == "Three.<|im_end|>\n"

    def test_prompt_and_completion_as_messages(self, make_tokenizer):
        tokenizer = make_tokenizer(CHATML)
        rows = [{"prompt": TALK[:2], "completion": TALK[2:3]}, {"prompt": TALK[:2], "completion": "Three."}]
        first, second = tokenise(tokenizer, PAIR, rows)
        assert counted(tokenizer, first) == "There are three apples.<|im_end|>\n"
        assert counted(tokenizer, second) == "Three.<|im_end|>\n"

    def test_texts_and_messages_do_not_mix(self, make_tokenizer):
        rows = [{"prompt": TALK[:2], "completion": TALK[2:3]}, {"prompt": "a", "completion": "b"}]
        with pytest.raises(DataError, match="mix texts and messages"):
            tokenise(make_tokenizer(CHATML), PAIR, rows)

    def test_without_a_chat_template(self, make_tokenizer):
        for columns, row in ((MESSAGES, {"messages": TALK}), (PAIR, {"prompt": TALK[:2], "completion": TALK[2:3]})):
            with pytest.raises(DataError, match="no chat template; put a"):
                tokenise(make_tokenizer(), columns, [row])

    def test_what_the_template_refuses_names_the_row(self, make_tokenizer):
        strict = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(DataError, match="refuses row 2 of the data: roles must alternate"):
            tokenise(make_tokenizer(strict), MESSAGES, [{"messages": []}, {"messages": TALK}])

    @pytest.mark.parametrize("value", ["text", [["a"]], [{"content": "no role"}], 3])
    def test_values_that_are_no_messages(self, make_tokenizer, value):
        with pytest.raises(DataError, match="row 1 of the data holds"):
            tokenise(make_tokenizer(CHATML), MESSAGES, [{"messages": value}])


class TestTokens:
    def test_given_ids_lose_their_padding(self, make_tokenizer):
        columns = Columns("tokens", ("input_ids",))
        row = {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1], "labels": [-100, -100, -100, 6, 7]}
        (made,) = tokenise(make_tokenizer(), columns, [row])
        assert made.input_ids.tolist() == [5, 6, 7]
        assert made.labels.tolist() == [-100, 6, 7]

    def test_ids_beyond_the_vocabulary(self, make_tokenizer):
        columns = Columns("tokens", ("input_ids",))
        with pytest.raises(DataError, match="row 2 of the data holds token id 64, but the model's vocabulary has 64"):
            tokenise(make_tokenizer(), columns, [{"input_ids": [1, 63]}, {"input_ids": [64, 2]}], vocab_size=64)

    @pytest.mark.parametrize(
        "row", [{"input_ids": "abc"}, {"input_ids": [1, 2], "labels": [1]}, {"input_ids": [[1], [2, 3]]}]
    )
    def test_rows_that_are_no_ids(self, make_tokenizer, row):
        with pytest.raises(DataError, match="row 1 of the data is no token row"):
            tokenise(make_tokenizer(), Columns("tokens", ("input_ids",)), [row])


def test_a_number_where_a_text_should_be(make_tokenizer):
    with pytest.raises(DataError, match="column 'text' of row 1 of the data holds a int"):
        tokenise(make_tokenizer(), TEXT, [{"text": 3}])


def test_encoder_segments(assets):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "all-minilm-l6-v2")
    columns = Columns("text", ("sentence1",), "sentence2")
    (row,) = tokenise(tokenizer, columns, [{"sentence1": "a cat", "sentence2": "a dog"}], causal=False)
    assert tokenizer.decode(row.input_ids) == "[CLS] a cat [SEP] a dog [SEP]"
    assert row.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert row.labels is None


def test_labels_of_a_sentencepiece_like_tokenizer(assets):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "stories260k")
    (row,) = tokenise(tokenizer, PAIR, [{"prompt": "Once upon a time, ", "completion": "there was a girl."}])
    assert counted(tokenizer, row).strip().removesuffix(tokenizer.eos_token) == "there was a girl."
