"""What a running server tells the world: metrics, spans, logs, and quantiles of the last minutes."""
