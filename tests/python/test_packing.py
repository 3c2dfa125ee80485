"""Sequences in one row are learned as they are alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

import qlora_native as qn  # noqa: E402
from _hf import tiny, with_adapters  # noqa: E402
from qlora_native.training import (  # noqa: E402
    LeakError,
    best_fit,
    check_isolation,
    packed_row,
    padding_share,
    use_chunked_loss,
)


def sequences(lengths=(9, 1, 4, 2, 7)):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(1, 64, (length,), generator=generator).tolist()
        labels = [i if k % 3 else -100 for k, i in enumerate(ids, 1)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


@given(st.lists(st.integers(1, 12), max_size=60))
def test_every_sequence_is_in_one_row_that_has_room(lengths):
    rows = best_fit(lengths, 12)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < total <= 12 for total in filled)
    # No two rows would fit into one, as any-fit packings are.
    assert all(a + b > 12 for k, a in enumerate(filled) for b in filled[:k])


def test_best_fit_is_the_best_where_that_is_known():
    assert best_fit([5, 7, 5, 7], 12) == [[1, 2], [3, 0]] or len(best_fit([5, 7, 5, 7], 12)) == 2
    assert len(best_fit([6] * 7, 12)) == 4
    assert best_fit([], 12) == []
    with pytest.raises(ValueError, match="sequence 1 has 13 tokens, a row 12"):
        best_fit([1, 13], 12)


def test_padding_share():
    assert padding_share([8] * 10, 4) == 0
    assert padding_share([], 4) == 0
    assert padding_share([2, 8], 2) == 1 - 10 / 16
    lengths = [1, 9] * 500
    # A batch of two is 1 and 1, 9 and 9, or mixed in half of the cases.
    assert padding_share(lengths, 2) == pytest.approx(1 - 10 / 14, abs=0.03)


def test_a_row_is_its_sequences_and_a_rest():
    first, second = sequences((3, 2))
    row = packed_row([first, second], pad=63, length=7)
    assert row["input_ids"].tolist() == [[*first["input_ids"], *second["input_ids"], 63, 63]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    labels = [-100, *first["labels"][1:], -100, *second["labels"][1:], -100, -100]
    assert row["labels"].tolist() == [labels]
    with pytest.raises(ValueError, match="have 5 tokens, the row 4"):
        packed_row([first, second], length=4)


def adapted(kind, **overrides):
    return with_adapters(tiny(kind, use_cache=False, **overrides))


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def alone(model, rows, items):
    """The sum over sequences that are run one at a time."""
    total = 0.0
    for row in rows:
        if all(label == -100 for label in row["labels"][1:]):
            continue
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=items).loss
        loss.backward()
        total += loss.item()
    return total, gradients(model)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen", "mixtral"])
def test_a_packed_step_is_the_steps_of_its_sequences(kind, attention, chunked):
    model = adapted(kind, attn_implementation=attention)
    if chunked:
        use_chunked_loss(model, chunk_tokens=6)
    check_isolation(model)
    rows = sequences()
    items = sum(label != -100 for row in rows for label in row["labels"][1:])
    expected, expected_gradients = alone(model, rows, items)
    flat = packed_row(rows)
    two = [packed_row(rows[:2], length=16), packed_row(rows[2:], length=16)]
    stacked = {name: torch.cat([row[name] for row in two]) for name in flat}
    for batch in (flat, stacked):
        loss = model(**batch, num_items_in_batch=items).loss
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(
                gradient, expected_gradients[name], rtol=1e-3, atol=1e-5, msg=name
            )
    # The check can fail: in a row without positions of their own, sequences see each other.
    del flat["position_ids"]
    loss = model(**flat, num_items_in_batch=items).loss
    assert abs(loss.item() - expected) > 1e-3 * expected


def test_sliding_windows_do_not_reach_into_another_sequence():
    sizes = {"sliding_window": 4, "use_cache": False, "attn_implementation": "sdpa"}
    config = transformers.MistralConfig(**tiny("llama").config.to_diff_dict() | sizes)
    model = transformers.MistralForCausalLM(config).train()
    check_isolation(model)
    rows = sequences()
    expected, expected_gradients = alone(model, rows, 10)
    loss = model(**packed_row(rows), num_items_in_batch=10).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5)


def test_models_that_do_not_keep_sequences_apart_are_found():
    state = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    )
    with pytest.raises(LeakError, match="MambaForCausalLM"):
        check_isolation(state.train())
    assert state.training

    class Deaf(transformers.LlamaForCausalLM):
        def forward(self, input_ids, position_ids=None, **kwargs):
            return super().forward(input_ids, **kwargs)

    with pytest.raises(LeakError, match="in Deaf a sequence sees the one before it"):
        check_isolation(Deaf(tiny("llama", use_cache=False).config))
    with pytest.raises(LeakError, match="OPTForCausalLM"):
        check_isolation(tiny("opt", use_cache=False))
    with pytest.raises(LeakError, match=r"config\.use_cache is True"):
        check_isolation(tiny("llama"))

    class Displaced(transformers.LlamaForCausalLM):
        """Its learned positions are those of the row."""

        def forward(self, input_ids, **kwargs):
            output = super().forward(input_ids, **kwargs)
            count = output.logits.shape[1]
            output.logits = output.logits * torch.arange(1.0, count + 1)[:, None]
            return output

    with pytest.raises(LeakError, match="is not computed as alone"):
        check_isolation(Displaced(tiny("llama", use_cache=False).config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_round_differently_with_other_tokens_and_keep_sequences_apart(dtype):
    model = tiny("mixtral").to(dtype)
    qn.quantize_model(model)
    model.config.use_cache = False
    check_isolation(model)


def test_the_modes_of_a_models_parts_are_what_they_were():
    model = tiny("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    model.config.use_cache = False
    check_isolation(model)
    use_chunked_loss(model)
    assert [module.training for module in model.modules()] == before
