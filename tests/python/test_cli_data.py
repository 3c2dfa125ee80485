"""Documents become chunks without loss, conversations become sequences with the right labels."""

import pytest

from _cli import make_model, run_cli, sentences, write_jsonl
from qlora_native.cli import data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    make_model(path / "model")
    return path


@pytest.fixture
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model")


def test_packing_keeps_every_token_in_order(tmp_path, tokenizer):
    texts = sentences(7)
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    packed = data.tokenize(data.read_documents([file], "--data"), tokenizer, 10)
    expected = [
        i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ]
    assert [i for row in packed.rows["input_ids"] for i in row] == expected
    assert {len(row) for row in packed.rows["input_ids"][:-1]} == {10}
    assert list(packed.rows["labels"]) == list(packed.rows["input_ids"])


def test_formats_give_the_same_documents(tmp_path):
    from datasets import Dataset

    text = "one line\n\nanother line\n"
    (tmp_path / "a.txt").write_text(text)
    write_jsonl(tmp_path / "a.jsonl", [{"text": text, "source": "somewhere"}])
    Dataset.from_dict({"n": [1], "text": [text]}).to_parquet(tmp_path / "a.parquet")
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        assert data.read_documents([tmp_path / name], "--data").to_dict() == {"text": [text]}, name
    both = data.read_documents([tmp_path / "a.txt", tmp_path / "a.parquet"], "--data")
    assert both.to_dict() == {"text": [text, text]}


CONVERSATION = [
    {"role": "user", "content": "fox?"},
    {"role": "assistant", "content": "quick brown"},
    {"role": "user", "content": "dog?"},
    {"role": "assistant", "content": "lazy"},
]


def learned(tokenizer, row):
    """The text under the labels, with gaps marked."""
    ids = [
        i if label != data.IGNORED else None
        for i, label in zip(row["input_ids"], row["labels"], strict=True)
    ]
    parts, current = [], []
    for i in [*ids, None]:
        if i is None:
            if current:
                parts.append(tokenizer.decode(current))
            current = []
        else:
            current.append(i)
    return parts


def conversations(tmp_path, tokenizer, length=100):
    file = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CONVERSATION}])
    return data.tokenize(data.read_documents([file], "--data"), tokenizer, length)


def test_plain_format_learns_what_the_assistant_says(tmp_path, tokenizer):
    assert tokenizer.chat_template is None
    made = conversations(tmp_path, tokenizer)
    assert made.loss_on == "the assistant's turns (the plain chat format)"
    assert learned(tokenizer, made.rows[0]) == ["quick brown<end>\n", "lazy<end>\n"]
    assert "### User:\nfox?" in tokenizer.decode(made.rows[0]["input_ids"])


def test_the_tokenizers_template_is_used(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    made = conversations(tmp_path, tokenizer)
    assert made.loss_on == "the assistant's turns (the tokenizer's chat template)"
    assert learned(tokenizer, made.rows[0]) == ["quick brown;", "lazy;"]


def test_a_template_that_rewrites_earlier_turns_is_learned_whole(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    made = conversations(tmp_path, tokenizer)
    assert made.loss_on == "all tokens (the tokenizer's chat template)"
    assert learned(tokenizer, made.rows[0]) == ["4fox?quick browndog?lazy"]


def test_a_conversation_cut_before_the_assistant_speaks_is_left_out(tmp_path, tokenizer):
    from qlora_native.cli.errors import InputError

    with pytest.raises(InputError, match="no sequence"):
        conversations(tmp_path, tokenizer, length=3)


def test_split_by_document_is_disjoint_and_repeatable(tmp_path, tokenizer):
    texts = sentences(20)
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    documents = data.read_documents([file], "--data")
    train, held_out = data.split(documents, tokenizer, 16, 0.2, seed=3)
    again = data.split(documents, tokenizer, 16, 0.2, seed=3)
    assert list(held_out.rows["input_ids"]) == list(again[1].rows["input_ids"])

    def texts_of(part):
        flat = [i for row in part.rows["input_ids"] for i in row]
        return set(tokenizer.decode(flat).split("<end>")) - {""}

    assert len(texts_of(held_out)) == 4
    assert texts_of(held_out) | texts_of(train) == set(texts)
    assert not texts_of(held_out) & texts_of(train)


def test_one_document_is_split_by_sequence(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(" ".join(sentences(20)))
    documents = data.read_documents([tmp_path / "a.txt"], "--data")
    whole = data.tokenize(documents, tokenizer, 16)
    train, held_out = data.split(documents, tokenizer, 16, 0.1, seed=3)
    parts = [*train.rows["input_ids"], *held_out.rows["input_ids"]]
    assert parts == list(whole.rows["input_ids"])
    assert len(held_out) == round(0.1 * len(whole))


def test_padding_is_neither_attended_nor_learned(tokenizer):
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = data.Collator(tokenizer)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]


def test_loss_does_not_depend_on_how_rows_fall_into_batches(folder, tmp_path):
    import json

    file = write_jsonl(tmp_path / "chat.jsonl", [
        {"messages": CONVERSATION[: 2 * n]} for n in (1, 2, 1, 2, 2)
    ])  # fmt: skip
    common = (
        "evaluate", "--model", folder / "model", "--data", file, "--json", "--no-bf16",
        "--device", "cpu", "--max-seq-length", 64, "--per-device-eval-batch-size",
    )  # fmt: skip
    losses = [json.loads(run_cli(*common, size).out)["eval_loss"] for size in (1, 2, 5)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_several_files_after_one_option(folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("the quick brown fox")
    common = ("evaluate", "--model", folder / "model", "--json", "--device", "cpu",
              "--max-seq-length", 64)  # fmt: skip
    together = run_cli(*common, "--data", tmp_path / "a.txt", tmp_path / "b.txt")
    apart = run_cli(*common, "--data", tmp_path / "a.txt", "--data", tmp_path / "b.txt")
    assert together.code == 0, together.err
    assert together.out == apart.out
    joined = run_cli(*common, f"--data={tmp_path / 'a.txt'}", tmp_path / "b.txt")
    assert joined.out == apart.out, joined.err
