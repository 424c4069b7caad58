"""Published methods, one file each: what they fit, and how it is applied."""
