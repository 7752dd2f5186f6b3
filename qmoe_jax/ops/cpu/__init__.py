"""Products with stored codes on the cores of a CPU; imported when they are asked for."""
