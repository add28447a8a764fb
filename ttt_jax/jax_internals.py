"""Every private part of jax that this package uses, and why the public interface does not do. No
other file mentions one.

Tried with jax 0.10.2, 0.11.2 and 0.12; pyproject.toml admits no later minor version.

    cudnn_attention             `jax.nn.dot_product_attention` takes no offsets of documents, and
                                rounds the log-sum-exp to 16 bits
    cudnn_attention_backward    a public gradient takes the statistics of its own keys, not those of
                                a whole row that is split into blocks
    splash_attention_backward   the same, on TPUs
    in_cloud_tpu_vm             jax decides by it whether a metadata server knows the other hosts
    believe_in_cudnn            jax asks a real GPU before it traces for one that is on paper only

When a new jax breaks one of them: read the definition of the same name in the new jax's source, and
correct the call here. tests/gpu (a CUDA device), tests/ops/test_splash.py (any machine) and
tests/process/test_multihost.py then tell whether it does the same. Then add the version to the list
above, and raise the limit in pyproject.toml.

Nothing is imported before a function is called: whoever imports this file need not have jax yet.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any


def cudnn_attention(q_BTNH, k_BSKH, v_BSKH, *, mask: str, **options) -> Any:
    """Call cuDNN's flash attention, with gradients.

    Args:
      mask: "CAUSAL", "NO_MASK", "PADDING" or "PADDING_CAUSAL".
      options: `scale`, `q_seqlen`, `kv_seqlen`, `q_offsets`, `kv_offsets`, `sliding_window_length`,
        `qkv_layout`, `return_residual`.

    Returns: o_BTNH; with `return_residual` also the log-sum-exp, float32 [B, N, T].
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return cudnn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask_type=cudnn.MaskType[mask], **options
    )


def cudnn_attention_backward(
    q_BTNH, k_BSKH, v_BSKH, lse_BNT, o_BTNH, do_BTNH, *, mask: str, scale: float
) -> Any:
    """Call the backward of cuDNN's attention with statistics and outputs of the caller's.

    Returns: dq, dk, dv.
    """
    import jax.numpy as jnp
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    none = jnp.zeros(0, q_BTNH.dtype)
    params: dict[str, Any] = {
        "scale": scale,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": cudnn.MaskType[mask],
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    # jax 0.11 and later
    if "score_mod" in inspect.signature(cudnn._dot_product_attention_bwd_rule).parameters:
        params["score_mod"] = None
    bind = cudnn._dot_product_attention_bwd_p_wrapper.bind
    return bind(q_BTNH, k_BSKH, v_BSKH, *(none,) * 7, lse_BNT, o_BTNH, do_BTNH, **params)


def splash_attention_backward(
    kernel: Any, q_NTH, k_KSH, v_KSH, segment_ids, o_NTH, lse_NT, do_NTH
) -> Any:
    """Call the backward of a splash attention kernel with statistics and outputs of the caller's.

    Args:
      kernel: made by `make_splash_mha`.
      segment_ids: its `SegmentIds`, or None.

    Returns: dq, dk, dv of one sequence.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    residuals = (
        *(q_NTH, k_KSH, v_KSH, segment_ids, None, o_NTH, lse_NT),
        *(kernel.dq_mask_info, kernel.dkv_mask_info),
    )
    options = {name: kernel.kwargs[name] for name in _SPLASH_BACKWARD_OPTIONS}
    gradients = splash_attention_kernel._splash_attention_bwd(**options, res=residuals, do=do_NTH)
    return gradients[3:6]


_SPLASH_BACKWARD_OPTIONS = (
    "save_residuals",
    "mask_value",
    "is_mqa",
    "block_sizes",
    "residual_checkpoint_name",
    "mask_function",
    "attn_logits_soft_cap",
    "interpret",
)


def in_cloud_tpu_vm() -> bool:
    """Say whether this is a TPU VM of Google Compute Engine, whose metadata server knows the other
    hosts. False where jax does not tell.
    """
    try:
        from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
    except ImportError:
        return False
    return bool(running_in_cloud_tpu_vm)


def believe_in_cudnn(version: int = 91200) -> None:
    """Let jax trace cuDNN's attention without asking a GPU what it can do. For benchmarks that
    compile for GPUs on paper.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    cudnn.check_cudnn_version = lambda: version
    cudnn.check_compute_capability = lambda *_: True


def believe_in_hopper() -> None:
    """Let jax lower Pallas' Triton kernels for an H100 that is not there. For benchmarks that
    compile for GPUs on paper. jax 0.10 does so by itself.
    """
    if importlib.util.find_spec("jax._src.pallas.triton.gpu_info") is not None:
        info: Any = importlib.import_module("jax._src.pallas.triton.gpu_info")
        found = info._get_gpu_info_impl(info.GpuVersion.H100)
        info.get_gpu_info = lambda: found
