"""The artifact folder: what is written, read, described, and how diffusers loads it."""
