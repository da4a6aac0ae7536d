"""What a running server tells the world: metrics, spans, logs, quantiles of recent minutes."""
