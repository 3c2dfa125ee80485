"""The command `evaluate`: the loss of a model, dense or quantized, with or without an adapter."""

from __future__ import annotations

import contextlib
import json

from torch.utils.data import DataLoader

from qlora_native.cli import data, loading, models
from qlora_native.cli.errors import allocating, require
from qlora_native.cli.loss import mean_token_loss, perplexity
from qlora_native.cli.options import EvaluateOptions
from qlora_native.cli.progress import LayerProgress, stderr, stdout
from qlora_native.training import UnsupportedModelError, use_chunked_loss


def evaluate(options: EvaluateOptions) -> None:
    """Prints the mean loss per token and the perplexity over the files.

    Raises:
        InputError: see the messages.
    """
    batch = options.per_device_eval_batch_size
    require(batch >= 1, f"--per-device-eval-batch-size {batch}: must be 1 or more")
    require(options.max_seq_length >= 2, f"--max-seq-length {options.max_seq_length}: at least 2")
    data.check_files(options.data, "--data")
    where = loading.placement(options)
    loading.check_model_path(options.model)
    if warning := models.adopt_quantization(options):
        stderr.print(warning, highlight=False, soft_wrap=True)
    loading.check_quantization(options)
    loading.check_context(options.model, options.max_seq_length)
    tokenizer = loading.load_tokenizer(options.model)
    documents = data.read_documents(options.data, "--data")
    sequences = data.tokenize(documents, tokenizer, options.max_seq_length)
    with LayerProgress() as progress:
        model = models.load_for_inference(options, where, progress)
    with contextlib.suppress(UnsupportedModelError):
        # As `finetune` evaluates, to the same number; what has another loss keeps it.
        use_chunked_loss(model, in_evaluation=True)
    loader = DataLoader(sequences.rows, batch_size=batch, collate_fn=data.Collator(tokenizer))
    with allocating(
        f"evaluating {batch} x {options.max_seq_length} tokens at a time:",
        "reduce --per-device-eval-batch-size or --max-seq-length.",
    ):
        loss, tokens = mean_token_loss(model, loader, where.dtype)
    if options.json:
        print(json.dumps({"eval_loss": loss, "perplexity": perplexity(loss), "tokens": tokens}))
        return
    stdout.print(
        f"loss {loss:.4f} nats per token, perplexity {perplexity(loss):.2f}, {tokens:,} tokens "
        f"({sequences.loss_on})",
        highlight=False,
        soft_wrap=True,
    )
