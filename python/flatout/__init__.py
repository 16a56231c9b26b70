"""flatout: LLM training ops in C and CUDA C."""
