"""What the planner computes before it draws the graph: the model's shape, formats of its layers, costs of tasks."""
