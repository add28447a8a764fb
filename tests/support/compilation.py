"""XLA's options for programs of tests.

They are tiny: compiling them takes most of the time, so it does without what makes large programs
fast. XLA's older emitters of fusions and one module per program compile in half the time. A
version that does not know the extra option passes over it. No result depends on any of it.
"""

CHEAP = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
