"""`sku monitor`: sends a running server the same prompts at intervals and raises an alarm when harmful answers become more frequent."""
