"""Task bodies, the object store, the node-local cache, and the executor that runs tasks on Ray."""
