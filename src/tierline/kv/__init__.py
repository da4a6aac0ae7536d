"""KV memory: who holds which block, what is cached where, and what should move."""
