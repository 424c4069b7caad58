"""Recipe to task graph, queue with leases, scheduler, registry of releases, command line."""
