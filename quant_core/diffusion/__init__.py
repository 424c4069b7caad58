"""Denoisers, what they are told, the samplers that run them, and recordings of their inputs."""
