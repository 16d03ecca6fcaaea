"""The vLLM plugin: one model name, each request answered by one of several arms (original, negated, another server), with metrics per arm.

`start.serve` starts a server.
"""
