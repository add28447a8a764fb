"""XLA's options for programs of tests.

They are tiny: compiling them takes most of the time, so it does without what makes large programs
fast. XLA's older emitters of fusions and one module per program compile in half the time. A
version that does not know the extra option passes over it. No result depends on any of it.
"""

import atexit
import ctypes
import gc
import resource
import shutil
import sys
import tempfile
from pathlib import Path

CHEAP = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"


def keep_programs() -> None:
    """Let jax keep the compiled programs of this process in a folder that ends with it: tests that
    lower the same program compile it once. A program from there is the same machine code.

    The folder is not shared: jax writes its files in place, and another process would read halves.
    """
    import jax

    folder = tempfile.mkdtemp(prefix="ttt_jax_programs_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def forget_programs(limit: int) -> None:
    """Drop the compiled programs and traces in memory where this process holds more bytes than
    `limit`. `keep_programs` has the programs.
    """
    import jax

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    if pages * resource.getpagesize() > limit:
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":  # what is free goes back to the system
            getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
