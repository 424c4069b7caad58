"""What a running orchestrator shows to those who watch it: metrics for Prometheus, and its health."""
