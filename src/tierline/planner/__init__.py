"""From a trace, a model and service levels to a fleet, with the working shown."""
