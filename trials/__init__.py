"""Trials of high availability: a fault, a stopwatch, and what must hold afterwards, in a lab of real hosts."""
