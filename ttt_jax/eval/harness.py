r"""The adapter to lm-evaluation-harness: `lm_eval --model ttt_jax`. Import this module lazily: it
needs the extra "eval".

lm_eval 0.4 finds models in its own table only (no entry points; `--include_path` is for tasks), so
its command line needs one import before it starts. This module does that when run:

    python -m ttt_jax.eval.harness run --model ttt_jax --model_args pretrained=DIR \
        --tasks niah_single_1 ...

and `ttt-jax eval --tasks` goes through harness_tasks.py. From Python: `import
ttt_jax.eval.harness`, then `lm_eval.simple_evaluate("ttt_jax", model_args={"path": ...}, ...)`.

Every request is a stream of its own from fresh fast weights: nothing that one sample wrote reaches
another. Prompts are never cut, whatever their length (`max_length` cuts them from the left, as
other backends do).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.models  # pyright: ignore[reportMissingImports]  # noqa: F401  (its own models: only an empty table is filled later)
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from ttt_jax.display.progress import progress
from ttt_jax.errors import UserError
from ttt_jax.eval.answers import Judge, Judgement
from ttt_jax.files.reading import companion_fields
from ttt_jax.inference.chat_template import ChatTemplate, find_template, special_tokens
from ttt_jax.inference.generation import Session
from ttt_jax.inference.sampling import Sampling
from ttt_jax.inference.watch import Watch
from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.load import run_folder


class TTTJaxLM(TemplateLM):
    """A model of this library for the harness.

    Args:
      path: model folder (Hugging Face, converted, or of a run); or give `model`.
      model: a loaded `Transformer` with a tokenizer; `path` then only says where
        tokenizer_config.json lies.
      ttt: False switches the adaptation off.
      dtype: as of `load_pretrained`; None: float32 on CPUs, bfloat16 elsewhere.
      batch_size: requests read at once.
      max_length: cut longer prompts from the left; None never cuts.
      max_gen_toks: of tasks that do not say.
      piece: tokens read at a time.
      pretrained: another name of `path`, the one under which RULER's tasks look for a tokenizer
        folder.
      device, max_batch_size: of lm_eval's command line; jax chooses the device.

    Raises: CheckpointError for a bad folder, UserError for a model without tokenizer.
    """

    backend = "causal"

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        model: Transformer | None = None,
        ttt: bool | str = True,
        dtype: str | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        piece: int | None = None,
        pretrained: str | Path | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        path = path if path is not None else pretrained
        if model is None:
            if path is None:
                raise UserError("model_args path: missing; give path=DIR, the model's folder")
            model = _load(Path(path), dtype)
        if model.tokenizer is None:
            raise UserError(
                f"model {path}: the harness needs a tokenizer; put tokenizer.json into the "
                "model's folder"
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size = {batch_size!r}: must be a number of requests, such as 8")
        if str(ttt).lower() not in ("true", "false", "1", "0"):
            raise UserError(f"model_args ttt = {ttt!r}: must be true or false")
        self.model, self.ttt = model, str(ttt).lower() in ("true", "1")
        self.tokenizer = model.tokenizer
        # Of a run's step, tokenizer and template lie in the run.
        self.path = (run_folder(Path(path)) or Path(path)) if path is not None else None
        self.batch_size, self.piece = int(batch_size), piece
        self.max_length, self.max_gen_toks = max_length, max_gen_toks
        self._watch = Watch(model)
        self._settings = (
            {} if self.path is None else companion_fields(self.path, "tokenizer_config.json")
        )
        self._template: ChatTemplate | None = None
        bos = self._settings.get("bos_token")
        bos = bos.get("content") if isinstance(bos, dict) else bos
        ids = self.tokenizer.encode(bos) if isinstance(bos, str) else []
        self.bos_id = ids[0] if len(ids) == 1 else None
        self.add_bos = bool(self._settings.get("add_bos_token")) and self.bos_id is not None

    # --------------------------------------------------------------------------------------- tokens

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_id is None:
            raise UserError(
                "tokenizer: has no end token, which stands before empty contexts; name eos_token"
            )
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Return what stands before a text without context."""
        return self.bos_id if self.bos_id is not None else self.eot_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text, after the begin token if the tokenizer's settings want one
        (never twice).
        """
        ids = list(self.tokenizer.encode(string))
        if self.add_bos and add_special_tokens is not False and ids[:1] != [self.bos_id]:
            assert self.bos_id is not None
            return [self.bos_id, *ids]
        return ids

    # ------------------------------------------------------------------------------------ the model

    def judge(self, rows: Sequence[Sequence[int]]) -> list[Judgement]:
        """Compute the log-probabilities of the tokens of each row. A dummy overrides this."""
        with progress("scoring", len(rows), "requests") as advance_to:
            judge = Judge(
                self.model,
                ttt=self.ttt,
                batch_size=self.batch_size,
                piece=self.piece,
                watch=self._watch,
            )
            return judge(rows, advance_to)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Sequence[str],
        sampling: Sampling,
    ) -> list[str]:
        """Continue a batch of prompts. A dummy overrides this."""
        session = Session(self.model, len(prompts), ttt=self.ttt, piece=self.piece)
        session.extend(list(prompts))
        return [
            completion.text or ""
            for completion in session.generate(max_new_tokens, sampling, stop=stop)
        ]

    # ---------------------------------------------------------------------------------- the harness

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Sum of the continuation's log-probabilities, and whether each of its tokens is the most
        likely one.
        """
        rows = []
        for (context, continuation), before, after in requests:
            if not before or not after:
                raise UserError(
                    f"task: request {(context[-40:], continuation[:40])!r} has no context or no "
                    "tokens to score"
                )
            rows.append(self._cut([*before, *after]))
        results = []
        for key_and_ids, judgement in zip(requests, self.judge(rows), strict=True):
            n = min(len(key_and_ids[2]), len(judgement.logprobs_T))
            answer = (
                float(judgement.logprobs_T[-n:].sum(dtype="float64")),
                bool(judgement.greedy_T[-n:].all()),
            )
            results.append(answer)
            self.cache_hook.add_partial("loglikelihood", key_and_ids[0], answer)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Compute the log-probability of each whole text, read as one stream: every token sees (and
        adapts to) all before it.
        """
        texts = [request.args[0] for request in requests]
        # An empty text is the prefix alone, which has nothing to score: its log-probability is 0.
        rows = [
            [self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False)]
            for text in texts
        ]
        results = [
            float(judgement.logprobs_T.sum(dtype="float64")) for judgement in self.judge(rows)
        ]
        for text, result in zip(texts, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), result)
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each prompt until a stop string, an end token or the task's limit; batched by
        length.
        """
        jobs: dict[str, list[int]] = {}  # requests of one kind may share a batch
        for n, request in enumerate(requests):
            jobs.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(n)
        results, done = [""] * len(requests), 0
        with progress("generating", len(requests), "requests") as advance_to:
            for settings, members in jobs.items():
                limit, stop, sampling = self._generation(json.loads(settings))
                ids = {
                    n: self._cut(self.tok_encode(requests[n].args[0]), limit)
                    or [self.prefix_token_id]
                    for n in members
                }
                members = sorted(members, key=lambda n: -len(ids[n]))
                for start in range(0, len(members), self.batch_size):
                    part = members[start : start + self.batch_size]
                    # The last batch is filled up with short rows, so that it is no program of its
                    # own.
                    fill = [ids[part[0]][-1:]] * (self.batch_size - len(part) if start else 0)
                    texts = self.write([ids[n] for n in part] + fill, limit, stop, sampling)
                    for n, text in zip(part, texts, strict=False):
                        results[n] = text
                        self.cache_hook.add_partial("generate_until", requests[n].args, text)
                    done += len(part)
                    advance_to(done)
        return results

    def _generation(self, settings: dict[str, Any]) -> tuple[int, list[str], Sampling]:
        until = settings.get("until") or []
        stop = [text for text in ([until] if isinstance(until, str) else until) if text]
        limits = (settings.get(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens"))
        limit = int(next((value for value in limits if value), self.max_gen_toks))
        temperature = (
            float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        )
        if temperature == 0.0:
            return limit, stop, Sampling()
        return (
            limit,
            stop,
            Sampling(
                temperature, settings.get("top_k"), settings.get("top_p"), settings.get("min_p")
            ),
        )

    def _cut(self, ids: list[int], room: int = 0) -> list[int]:
        return ids if self.max_length is None else ids[-max(int(self.max_length) - room, 1) :]

    # ------------------------------------------------------------------------------- chat templates

    @property
    def tokenizer_name(self) -> str:
        return str(self.path or self.tokenizer.fingerprint).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template's source; of several, the one of this name, else "default".

        Raises: UserError when the folder has none (of this name).
        """
        return find_template(
            self.path,
            self._settings,
            chat_template if isinstance(chat_template, str) else "default",
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as one prompt; without `add_generation_prompt` the last message is left open, to
        be continued.
        """
        if self._template is None:
            self._template = ChatTemplate(
                self.chat_template() or "", special_tokens(self._settings)
            )
        return self._template.render(chat_history, add_generation_prompt)


def _load(path: Path, dtype: str | None) -> Transformer:
    import jax

    from ttt_jax.model.stack import Runtime
    from ttt_jax.pretrained.load import load_pretrained

    on_cpu = jax.default_backend() == "cpu"
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    return load_pretrained(path, dtype=dtype, runtime=Runtime(dtype=dtype, scan_layers=on_cpu))


def main() -> int:
    """Run lm_eval's command line, with the model "ttt_jax" known."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # Run as a script, this file is the module __main__; the registered class must be the importable
    # one, and only that one: lm_eval refuses a name that is registered twice.
    from ttt_jax.eval import harness

    raise SystemExit(harness.main())
register_model("ttt_jax")(TTTJaxLM)
