"""One file for each release that changed the schema."""
