"""Log-probabilities of prompts by SGLang's engine, with and without adapters, as JSON.

    python tests/memory/sglang_engine.py JOB.json ANSWER.json

JOB has `options` (of `sglang.Engine`), `ids`, and `calls`: a list of calls, each either a list of
adapters' names, the rows of one batch (null: none), or {"load": name, "path": folder}. ANSWER has
for each of them the rows' log-probabilities, or what loading said ("" when it was done).

A program of its own, because the engine's processes import this file again, and need what follows.
Without an accelerator two things of SGLang 0.5.23 are missing here. Its LoRA code asks for pinned
memory, which torch refuses: memory is not pinned then. `sgl_kernel` has wheels for accelerators
only: where it is not installed, its functions raise. Neither changes a number.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import types
from pathlib import Path

import torch


def unpinned(make):
    @functools.wraps(make)
    def made(*args, pin_memory=False, **kwargs):
        return make(*args, **kwargs)

    return made


class Kernels(types.ModuleType):
    """Stands for `sgl_kernel`: names can be imported, and no function can be called."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(f"sgl_kernel.{name}: there is no native kernel here")

        return missing


if not torch.accelerator.is_available():
    for name in ("arange", "empty", "full", "ones", "tensor", "zeros"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    if importlib.util.find_spec("sgl_kernel") is None:
        sys.modules["sgl_kernel"] = Kernels("sgl_kernel")


def main(job: Path, answer: Path) -> None:
    import sglang

    asked = json.loads(job.read_text())
    engine, answers = sglang.Engine(**asked["options"]), []
    try:
        for call in asked["calls"]:
            if isinstance(call, dict):
                found = engine.load_lora_adapter(call["load"], call["path"])
                answers.append("" if found.success else found.error_message)
                continue
            rows = engine.generate(
                input_ids=[asked["ids"]] * len(call),
                sampling_params=[{"max_new_tokens": 1, "temperature": 0}] * len(call),
                return_logprob=True,
                logprob_start_len=0,
                lora_path=call,
            )
            kept = [row["meta_info"]["input_token_logprobs"][1:] for row in rows]
            answers.append([[token[0] for token in row] for row in kept])
    finally:
        engine.shutdown()
    answer.write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
