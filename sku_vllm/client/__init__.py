"""HTTP clients of a running server: chat requests, its metrics per arm, and plain HTTP calls."""
