"""Demand: requests and service levels, one trace format and its importers, profiles, synthesis."""
