"""The virtual executor: prices steps, moves blocks, and writes down what happened."""
