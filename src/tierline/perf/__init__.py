"""The laws: bytes and seconds from facts, each with its evidence. No state, no input or output."""
