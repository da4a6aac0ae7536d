"""An OpenAI-compatible HTTP server over one engine, with a page to watch it."""
