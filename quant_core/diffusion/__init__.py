"""Denoisers, their conditioning, the samplers that run them, and recordings of their inputs."""
