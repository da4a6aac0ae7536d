"""Plan it, run it, prove it: production LLM serving, from a trace to a fleet one can defend."""
