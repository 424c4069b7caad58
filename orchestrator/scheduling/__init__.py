"""Executing queued tasks: leases, placement, progress."""
