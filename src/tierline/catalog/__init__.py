"""Facts with sources: models, accelerators, formats, tiers, prices, and the deployment file."""
