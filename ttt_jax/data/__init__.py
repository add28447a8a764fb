"""Data: files to documents, documents to tokens, tokens to packed rows."""

from ttt_jax.data.loader import (
    Batch,
    DataSummary,
    Loader,
    Piece,
    check_data,
    data_remarks,
    heldout_remarks,
    heldout_rows,
    make_loader,
    rejected_records,
)
from ttt_jax.data.quarantine import Rejected, write_quarantine
from ttt_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "DataSummary",
    "JsonTokenizer",
    "Loader",
    "Piece",
    "Rejected",
    "Tokenizer",
    "check_data",
    "data_remarks",
    "heldout_remarks",
    "heldout_rows",
    "load_tokenizer",
    "make_loader",
    "rejected_records",
    "write_quarantine",
]
