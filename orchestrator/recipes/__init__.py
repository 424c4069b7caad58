"""Recipes: what to do to a model, as data."""
