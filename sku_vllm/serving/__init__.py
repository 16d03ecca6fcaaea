"""The vLLM plugin: original and negated weights behind one name, measured arm by arm."""
