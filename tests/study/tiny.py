"""What trains in a second: real sentences, and a random BERT with a tokenizer of their words."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

GOOD = ("good", "fine", "lovely", "great")
BAD = ("bad", "dull", "awful", "poor")
THINGS = ("film", "book", "meal", "song", "play")

#: Sentences with the label that their adjective has.
SENTENCES = [
    (f"the {thing} was {very} {word}", str(int(word in GOOD)))
    for word, thing, very in itertools.product(GOOD + BAD, THINGS, ("very", "rather"))
]


def save_model(folder: Path) -> Path:
    """Save a random BERT encoder of 2 layers, 32 wide, and its tokenizer."""
    words = sorted({word for text, _ in SENTENCES for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,  # the usual 0.02 is too little for so narrow a model to learn in a second
    )
    BertModel(config).save_pretrained(folder)
    return folder


def save_rows(folder: Path) -> tuple[Path, Path]:
    """Write train.tsv and dev.tsv, columns `sentence` and `label`: four fifths and the rest."""
    paths = folder / "train.tsv", folder / "dev.tsv"
    parts = [row for i, row in enumerate(SENTENCES) if i % 5], SENTENCES[::5]
    for path, rows in zip(paths, parts, strict=True):
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths
