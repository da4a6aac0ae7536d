"""The executor that computes real tokens, with torch, under the scheduler that also simulates."""
