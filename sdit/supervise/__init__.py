"""Supervision: each launched process is a light supervisor that starts the training rank as its worker process.

The supervisor needs only the standard library, so that it starts in a fraction of a second and survives what ends a rank. It
watches the worker's heartbeat in shared memory and ends the worker at a deadline. The supervisors agree, through small files in
the run directory (the rendezvous store), on when an attempt is over and what follows. Rank 0's supervisor is the coordinator.
"""
