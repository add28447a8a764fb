"""Which fields of a config may change when a run continues: every field is named here, and a test
sees to that.

raised     accepted when it grows, and said once; refused when it falls
refused    the curve would be another one
rounding   accepted, and said once: the same arithmetic in another order
measured   accepted, and said once: the curve stays, held-out figures cannot be compared
free       accepted: where, how often and how safely, not what is computed
"""

from __future__ import annotations

RAISED, REFUSED, ROUNDING, MEASURED, FREE = "raised", "refused", "rounding", "measured", "free"

_NAMES = {
    RAISED: "steps",
    REFUSED: (
        "seed init_from compute_dtype "
        "model.vocab_size model.d_model model.num_layers model.num_heads model.num_kv_heads "
        "model.head_dim model.d_ff model.norm_eps model.max_positions model.rope.kind "
        "model.rope.base model.rope.factor model.rope.original_max_positions "
        "model.rope.low_freq_factor model.rope.high_freq_factor model.rope.beta_fast "
        "model.rope.beta_slow model.rope.attention_factor model.qk_norm model.qkv_bias "
        "model.o_bias model.mlp_bias model.tie_embeddings model.sliding_window "
        "model.full_attention_layers model.init_std model.ttt.layers model.ttt.chunk_size "
        "model.ttt.lr model.ttt.target model.ttt.last_target model.ttt.read_cap model.ttt.proj "
        "model.ttt.normalize_source model.ttt.write model.ttt.ridge model.ttt.decay "
        "model.ttt.clip_norm "
        "data.train data.heldout data.heldout_fraction data.format data.text_field data.tokenizer "
        "data.eos data.seq_len data.batch_size data.min_document data.pack data.shuffle "
        "data.max_record_bytes "
        "optimizer.lr optimizer.schedule optimizer.warmup_steps optimizer.warmup_ratio "
        "optimizer.decay_ratio optimizer.final_lr_ratio optimizer.b1 optimizer.b2 optimizer.eps "
        "optimizer.weight_decay optimizer.clip_norm optimizer.ttt_lr_warmup_steps "
        "optimizer.ttt_drop optimizer.groups"
    ),
    ROUNDING: (
        "remat_save unroll_layers model.ttt.apply model.ttt.implementation optimizer.accumulate "
        "mesh.data mesh.fsdp mesh.context mesh.tensor"
    ),
    MEASURED: "eval.rows eval.buckets",
    FREE: (
        "name runs_dir compile_cache data.workers data.max_bad_records "
        "checkpoint.every checkpoint.keep checkpoint.async_save checkpoint.wait_for_space "
        "checkpoint.copy_to "
        "guard.skips guard.rollbacks guard.min_state_ratio guard.max_state_ratio "
        "log.every log.documents log.probe_every log.tensorboard log.wandb eval.every "
        "sample.every sample.prompt sample.tokens sample.temperature"
    ),
}
FIELDS: dict[str, str] = {name: kind for kind, names in _NAMES.items() for name in names.split()}


def on_resume(field: str) -> str:
    """Say what happens when a dotted field has changed; a field that nobody has thought of is
    refused.
    """
    return FIELDS.get(field, REFUSED)
