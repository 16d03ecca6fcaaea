"""Room for kernels; `delta_merge` is mapped here from the checkout's kernels/ folder (pyproject.toml says why)."""
