"""The passes of a recipe, one file each: what users may say of it, and what its tasks are told."""
