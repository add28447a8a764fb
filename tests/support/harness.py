"""A small model behind the lm-evaluation-harness adapter."""

import functools

from support.models import config, make

from ttt_jax.data.tokenizer import ByteTokenizer


@functools.cache
def model_of():
    model = make(
        config(**{"ttt.chunk_size": 4, "num_layers": 2, "ttt.layers": (1,), "vocab_size": 257}),
        "float32",
    )
    model.tokenizer = ByteTokenizer()
    return model


def lm_of(path=None, **options):
    from ttt_jax.eval.harness import TTTJaxLM

    return TTTJaxLM(path, **{"model": model_of(), "batch_size": 2, "piece": 16} | options)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=n)
        for n, args in enumerate(arguments)
    ]
