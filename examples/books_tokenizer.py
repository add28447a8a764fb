"""Train a byte-level BPE tokenizer on the texts of a JSONL file (plain, .gz, .xz), for
`configs/books.yaml`.

python examples/books_tokenizer.py books_train.jsonl.xz books_tokenizer.json --vocab-size 16384
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def texts(path: Path, field: str, limit: int):
    """The first `limit` characters of each record's text: every book has its say, and training
    takes seconds.
    """
    with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)[field][:limit]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--field", default="text")
    parser.add_argument("--characters", type=int, default=200_000, help="of each record")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists; remove it or choose another name")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(args.data, args.field, args.characters), trainer)
    tokenizer.save(str(args.out))
    print(f"{args.out}: {tokenizer.get_vocab_size()} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
