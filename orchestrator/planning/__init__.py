"""From a recipe and a model to a graph of tasks: the model's shape, formats of its layers, passes, costs."""
