"""The maths of the operators, and how each machine computes it. This room knows torch only."""
