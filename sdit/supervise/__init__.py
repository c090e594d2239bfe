"""Runs that survive faults: every launched rank process is a light parent that starts the real rank as its child.

The parent needs the standard library alone, so that it is up in a fraction of a second and is not taken down by what
takes a rank down. It watches the child's pulse in shared memory, ends it at a deadline, and agrees with the other
parents, through small files in the run directory, on when an attempt is over and what follows. Rank 0's parent leads.
"""
