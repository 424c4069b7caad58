"""The object store, the node's cache, manifests and model folders."""
