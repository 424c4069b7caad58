"""Searches: what they ask for, the candidates that they measure, and the loop that takes one step after another."""
