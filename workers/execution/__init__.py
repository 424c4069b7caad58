"""Running task bodies: in this process, in a child, on Ray."""
