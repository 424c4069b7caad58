"""Prompts files: the shipped one, and what a job's pipeline is told."""
