"""The passes: each file draws the tasks of one, and says what they cost. `orchestrator.planning.planner` has the order.

A pass is a function that is given a `Draft`, yields tasks, and returns the draft with what it leaves to later passes.
One that a recipe does not ask for yields nothing.
"""
