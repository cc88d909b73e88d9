"""Many runs: comparisons of methods over tasks and seeds."""
