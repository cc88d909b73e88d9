"""What makes XLA compile fast for tests: no optimisation, the quicker of its code generators, one at a time."""

QUICK = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)
