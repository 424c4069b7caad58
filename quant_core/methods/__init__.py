"""Published methods, one folder each: what they fit, and how it is applied."""
