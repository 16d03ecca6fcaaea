"""How answers are decoded fast with transformers: attention without copies of keys and values, and caches that grow in place."""
